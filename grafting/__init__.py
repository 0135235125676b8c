"""Graft pretrained diffusion transformers: replace layers, distil, finetune, score."""

from grafting import diffusion, hosts, operators
from grafting.config import DataConfig, DistillConfig, ExperimentConfig, FinetuneConfig
from grafting.data import load_data
from grafting.distill import distill
from grafting.errors import UserError
from grafting.experiment import Run, run
from grafting.finetune import finetune
from grafting.hosts.loading import import_reference, load_host
from grafting.plan import GraftPlan
from grafting.sample import sample
from grafting.surgery import graft

__version__ = "0.1.0"

__all__ = [
    "DataConfig",
    "DistillConfig",
    "ExperimentConfig",
    "FinetuneConfig",
    "GraftPlan",
    "Run",
    "UserError",
    "diffusion",
    "distill",
    "finetune",
    "graft",
    "hosts",
    "import_reference",
    "load_data",
    "load_host",
    "operators",
    "run",
    "sample",
]
