"""Measure the embedded host `embedded:digits-dit` at several guidance scales against its floors.

    python tools/score_digits_dit.py

Prints a table and writes it to tools/score_digits_dit.json with the machine it ran on. FID is against the 4,000
training images; the floors are the 1,000 held-out images and the VAE's reconstructions of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from grafting import load_host, sample
from grafting.data import embedded_images
from grafting.eval import agreement, features, fid
from grafting.experiment import environment
from grafting.sample import balanced_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samplers", nargs="+", default=["dpm_solver"])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.1, 1.2, 1.3, 1.5])
    arguments = parser.parse_args()
    host = load_host("embedded:digits-dit")
    assert host.codec is not None
    parts = embedded_images("embedded:digits")
    train, (real, real_labels) = parts["train"][0], parts["held_out"]
    reference = fid.reference_statistics(train, "digits")
    train_features = features.extract(train, "digits")
    real_features = features.extract(real, "digits")
    rows: list[dict[str, Any]] = []

    def row(name: str, images: Any, labels: Any, check_copies: bool = True) -> None:
        found = features.extract(images, "digits")
        score = fid.score(found, reference)
        values: dict[str, Any] = {
            "what": name,
            "n": len(images),
            "fid": score.value,
            "fid_interval": score.interval,
            "class_agreement": agreement.class_agreement(images, labels),
        }
        if check_copies:
            copies = agreement.nearest_neighbour_check(found, train_features, real_features)
            values |= copies.model_dump()
        rows.append(values)
        print(json.dumps(values), flush=True)

    row("real held-out images", real, real_labels)
    reconstructions = host.codec.decode(host.codec.encode(real)[0])
    row("VAE reconstructions", reconstructions, real_labels)
    labels = balanced_labels(arguments.n, host.num_classes)
    for sampler in arguments.samplers:
        for guidance in arguments.guidance:
            images = sample(
                host, arguments.n, condition=labels, steps=arguments.steps, guidance=guidance, sampler=sampler
            )
            row(f"{sampler}, {arguments.steps} steps, guidance {guidance:g}", images, labels)
    result = {
        "command": "python tools/score_digits_dit.py",
        "arguments": vars(arguments),
        "environment": environment(),
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
