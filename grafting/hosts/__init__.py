"""Hosts: pretrained models that can be grafted. One file per family; `load_host` finds the right one."""
