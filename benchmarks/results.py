"""How close does a graft come to its host, and at what budget? Measures every number of docs/results.md.

    python benchmarks/results.py measure --threads 1 --part 0/2 &
    python benchmarks/results.py measure --threads 1 --part 1/2 &
    wait; python benchmarks/results.py report

`measure` goes through the cells below, writes each to benchmarks/results/<cell>.json when it is done and skips those
that are there, so that it continues where it was cut off; delete them to measure anew. `report` makes
docs/images/budget.svg and the tables of docs/results.md from them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t

from grafting import GraftPlan, UserError, distill, finetune, graft, load_host, sample
from grafting.config import ExperimentConfig, read_config
from grafting.data import Data, cache_folder, load_data
from grafting.eval import agreement, denoising, fid
from grafting.experiment import DENOISING_REPEATS, environment
from grafting.files import replacing_file, write_json
from grafting.hosts.base import Host
from grafting.sample import balanced_labels

ROOT = Path(__file__).parent.parent
ARMS = {
    "hyena_x": "configs/hyena_x_half.yaml",
    "self_graft": "configs/self_graft.yaml",
    # The finetuned host is the control of stage 2: what its training would do to a model that lacks nothing.
    "host": "configs/hyena_x_half.yaml",
}
SEEDS = (0, 1, 2)
BUDGETS = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Cell:
    """One arm at one budget (a share of the host's training samples; 0 is the host or fresh hybrid itself)."""

    arm: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.budget:g}-{self.seed}"


def cells() -> list[Cell]:
    """The claims first, on three seeds; then the curve over budgets."""
    claims = [("host", 0.0), ("hyena_x", 0.1), ("hyena_x", 0.0), ("self_graft", 0.1), ("host", 0.1)]
    wanted = [Cell(arm, budget, seed) for seed in SEEDS for arm, budget in claims]
    return wanted + [Cell("hyena_x", budget, seed) for seed in SEEDS for budget in BUDGETS[-2::-1]]


class Bench:
    """The host, its data and reference statistics, loaded once."""

    def __init__(self, n: int, compiled: bool) -> None:
        self.n, self.compiled = n, compiled
        self.configs = {arm: read_config(ROOT / path) for arm, path in ARMS.items()}
        self.host = self.load()
        self.data: Data = load_data(self.configs["hyena_x"].data, self.host)
        self.extractor = self.host.card.feature_extractor
        self.reference = fid.reference_statistics(self.data.train.images(), self.extractor, cache_folder() / "fid")
        self.host_losses: dict[int, torch.Tensor] = {}

    def load(self) -> Host:
        return self.ready(load_host(self.configs["hyena_x"].host))

    def ready(self, model: Host) -> Host:
        if self.compiled:
            model.model.compile()
        return model

    def losses(self, model: Host, seed: int) -> torch.Tensor:
        held_out = self.data.held_out
        return denoising.denoising_loss(model, held_out.mean, held_out.labels, seed=seed, repeats=DENOISING_REPEATS)

    def score(self, model: Host, seed: int) -> dict[str, Any]:
        labels = balanced_labels(self.n, model.num_classes)
        images = sample(model, self.n, condition=labels, seed=seed, batch_size=64)
        score = fid.fid(images, self.reference, self.extractor)
        if seed not in self.host_losses:
            self.host_losses[seed] = self.losses(self.host, seed)
        losses = self.losses(model, seed)
        mean = denoising.summary(losses, DENOISING_REPEATS)
        change = denoising.paired_difference(losses, self.host_losses[seed], DENOISING_REPEATS)
        return {
            "n": self.n,
            "fid": score.value,
            "fid_interval": score.interval,
            "denoising_loss": mean.mean,
            "denoising_loss_change": change.mean,
            "denoising_loss_change_interval": change.interval,
            "class_agreement": agreement.class_agreement(images, labels),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        config = self.configs[cell.arm]
        started = time.perf_counter()
        stages: dict[str, Any] = {}
        samples = 0
        if cell.arm == "host":
            model = self.load()
        else:
            model = self.ready(graft(self.host, GraftPlan.from_config(config.graft, self.host), cell.seed))
        if cell.budget == 0:
            stages["host" if cell.arm == "host" else "fresh"] = self.score(model, cell.seed)
        else:
            first, second = self.stages_of(config, cell)
            if first is not None:
                samples += distill(self.host, model, self.data, first, seed=cell.seed).samples
                if cell.budget == max(BUDGETS):
                    stages["distilled"] = {**self.score(model, cell.seed), "samples": samples}
            assert second is not None
            samples += finetune(model, self.data, second, teacher=self.host, seed=cell.seed).samples
            stages["finetuned"] = {**self.score(model, cell.seed), "samples": samples}
        return {
            "arm": cell.arm,
            "budget": cell.budget,
            "seed": cell.seed,
            "samples": samples,
            "stages": stages,
            "seconds": time.perf_counter() - started,
            "environment": {**environment(), "compiled": self.compiled},
        }

    def stages_of(self, config: ExperimentConfig, cell: Cell) -> tuple[Any, Any]:
        """Both stages' configs, their steps scaled together to the budget; the host spends all on the second."""
        assert config.distill is not None
        assert config.finetune is not None
        assert self.host.card.pretraining_samples is not None
        steps = int(cell.budget * self.host.card.pretraining_samples) // config.finetune.batch_size
        if cell.arm == "host":
            return None, config.finetune.model_copy(update={"steps": steps, "teacher_weight": 0.0})
        share = config.distill.steps / (config.distill.steps + config.finetune.steps)
        first = round(share * steps)
        return (
            config.distill.model_copy(update={"steps": first}),
            config.finetune.model_copy(update={"steps": steps - first}),
        )


def measure(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    part, parts = (int(number) for number in arguments.part.split("/"))
    mine = [cell for index, cell in enumerate(cells()) if index % parts == part]
    if arguments.only:
        mine = [cell for cell in cells() if cell.name in arguments.only]
    todo = [cell for cell in mine if not (arguments.folder / f"{cell.name}.json").exists()]
    bench = Bench(arguments.n, arguments.compile)
    for cell in todo:
        result = bench.measure(cell)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_json(arguments.folder / f"{cell.name}.json", result)
        last = list(result["stages"].values())[-1]
        print(
            f"{cell.name}: FID {last['fid']:.3f}, denoising loss {last['denoising_loss']:.4f},"
            f" {result['seconds']:.0f} s",
            flush=True,
        )


# The report.

Rows = dict[tuple[str, float, str], dict[int, dict[str, Any]]]


def collect(folder: Path) -> Rows:
    """Stage values by (arm, budget, stage) and seed."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} holds no measured cell; run `python benchmarks/results.py measure` first")
    rows: Rows = defaultdict(dict)
    for cell in found:
        for stage, values in cell["stages"].items():
            rows[cell["arm"], cell["budget"], stage][cell["seed"]] = values
    return rows


def mean_and_interval(values: list[float], digits: int) -> str:
    """Mean ± half width of Student's 95% interval over seeds; the bare value for a single seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


LABELS = {
    ("host", "host"): "host",
    ("hyena_x", "fresh"): "Hyena-X in half of the mixers, fresh",
    ("hyena_x", "distilled"): "… distilled",
    ("hyena_x", "finetuned"): "… finetuned",
    ("self_graft", "distilled"): "self-graft: all mixers fresh attention, distilled",
    ("self_graft", "finetuned"): "… finetuned",
    ("host", "finetuned"): "control: the host itself, finetuned",
}


def table(rows: Rows) -> str:
    host, fresh = rows.get(("host", 0.0, "host"), {}), rows.get(("hyena_x", 0.0, "fresh"), {})
    lines = [
        "| model | budget | seeds | FID | × host | denoising loss | change against host | class agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {key: index for index, key in enumerate(LABELS)}
    for (arm, budget, stage), found in sorted(
        rows.items(), key=lambda item: (order[item[0][0], item[0][2]], item[0][1])
    ):
        seeds = sorted(found)

        def column(key: str, seeds: list[int] = seeds, found: dict[int, dict[str, Any]] = found) -> list[float]:
            return [found[seed][key] for seed in seeds]

        ratios = [found[seed]["fid"] / host[seed]["fid"] for seed in seeds if seed in host]
        against_host = mean_and_interval(ratios, 2) if ratios else "–"
        spent = "0" if budget == 0 else f"{found[seeds[0]]['samples']:,} ({budget:.0%})"
        lines.append(
            f"| {LABELS[arm, stage]} | {spent} | {len(seeds)} | {mean_and_interval(column('fid'), 2)}"
            f" | {against_host} | {mean_and_interval(column('denoising_loss'), 4)}"
            f" | {mean_and_interval([1000 * v for v in column('denoising_loss_change')], 2)} × 10⁻³"
            f" | {statistics.fmean(column('class_agreement')):.1%} |"
        )
    for metric, name in (("fid", "FID"), ("denoising_loss", "denoising loss")):
        for stage in ("distilled", "finetuned"):
            found = rows.get(("hyena_x", max(BUDGETS), stage), {})
            closed = [
                (fresh[seed][metric] - found[seed][metric]) / (fresh[seed][metric] - host[seed][metric])
                for seed in sorted(found)
                if seed in fresh and seed in host
            ]
            if closed:
                lines.append("") if not lines[-1].startswith("- ") else None
                lines.append(
                    f"- gap in {name} closed by Hyena-X, {stage}: {mean_and_interval([100 * c for c in closed], 1)}%"
                )
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    host = rows.get(("host", 0.0, "host"), {})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, metric, name in zip(axes, ("fid", "denoising_loss"), ("FID", "denoising loss"), strict=True):
        means = []
        for budget in BUDGETS:
            found = rows.get(("hyena_x", budget, "finetuned"), {})
            ratios = [values[metric] / host[seed][metric] for seed, values in sorted(found.items()) if seed in host]
            axis.plot([100 * budget] * len(ratios), ratios, "o", color="#2f6f9f", alpha=0.5)
            if ratios:
                means.append((100 * budget, statistics.fmean(ratios)))
        if means:
            axis.plot(*zip(*means, strict=True), color="#2f6f9f", label="Hyena-X in half of the mixers")
        for arm, marker, label in (("self_graft", "s", "self-graft"), ("host", "^", "host, finetuned")):
            found = rows.get((arm, max(BUDGETS), "finetuned"), {})
            ratios = [values[metric] / host[seed][metric] for seed, values in sorted(found.items()) if seed in host]
            if ratios:
                axis.plot([100 * max(BUDGETS)], [statistics.fmean(ratios)], marker, color="#b4552d", label=label)
        axis.axhline(1, color="#888", linewidth=0.8)
        axis.axhline(1.1, color="#888", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks([100 * b for b in BUDGETS], [f"{100 * b:g}%" for b in BUDGETS])
        axis.minorticks_off()
        axis.set_xlabel("training samples, share of the host's")
        axis.set_ylabel(f"{name}, × host")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def report(arguments: argparse.Namespace) -> None:
    rows = collect(arguments.folder)
    text = table(rows)
    print(text)
    plot(rows, ROOT / "docs" / "images" / "budget.svg")
    page = ROOT / "docs" / "results.md"
    before, start, rest = page.read_text().partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not start or not end:
        raise UserError(f"{page} lacks the lines <!-- measured --> and <!-- end --> that the tables go between")
    with replacing_file(page) as temporary:
        temporary.write_text(f"{before}{start}\n{text}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).with_suffix(""))
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("--n", type=int, default=4000, help="images per score")
    one.add_argument("--part", default="0/1", help="i/k measures every k-th cell from the i-th")
    one.add_argument("--only", nargs="*", help="cells by name, such as hyena_x-0.1-0")
    one.add_argument("--threads", type=int, default=0)
    one.add_argument("--compile", action="store_true", help="torch.compile the models")
    one.set_defaults(call=measure)
    two = commands.add_parser("report")
    two.set_defaults(call=report)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
