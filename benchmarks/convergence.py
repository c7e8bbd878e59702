"""Linear self-attention of the paper's section 3.2 under the three masks: how near it comes to least squares.

    python benchmarks/convergence.py --output DIR [--layers 4000] [--draws 200]

Writes `convergence.json` and `convergence.svg` and `.png` (matplotlib: pip install 'ismdata[plots]'), prints a table.

The tokens are pairs (x_i, y_i), x_i of dimension d, in groups that stand for context blocks. A layer of linear
self-attention with the weights of von Oswald et al. (2023), which Ding et al. (2023, "CausalLM is not optimal for
in-context learning") take over for both kinds of mask, turns y_i into

    y_i - (step / n) * sum over the pairs k that i sees of y_k <x_k, x_i>

and leaves x_i. So after l layers y_i is y_i - <w_i, x_i> for weights w_i that start at 0 and follow

    w_i <- w_i + (step / n) * sum over the pairs k that i sees of (y_k - <w_k, x_k>) x_k

with n, the number of all pairs, the same for every i. Under `prefix` all pairs see all, all w_i are one, and this is
gradient descent on the squared error. Under `causal` pair i sees the pairs up to itself, under `ism` those up to the
end of its group. w* is the least-squares solution for all n pairs.

Where it comes to rest follows from subtracting what neighbours in line sum over: under `ism` each group's weights
must solve the least squares of that group alone, under `causal` each pair's own equation, <w_i, x_i> = y_i.

Shape legend: B draws, N pairs, D dimension.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.choices import MASK_COLOURS

Floats = NDArray[np.float64]

MASKS = ("prefix", "ism", "causal")
RESULTS_NAME, PICTURE_NAME = "convergence.json", "convergence"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run: pairs x ~ N(0, 1), y = <w, x> + noise * N(0, 1), w ~ N(0, 1)."""

    dimension: int = 4
    groups: int = 6
    pairs: int = 12  # in a group
    noise: float = 1.0
    step: float = 0.01
    layers: int = 4000

    @property
    def total(self) -> int:
        return self.groups * self.pairs

    def draw(self, seed: int) -> tuple[Floats, Floats]:
        """x, [N, D], and y, [N]. Drawn in the order x, noise, w."""
        generator = np.random.default_rng(seed)
        x = generator.standard_normal((self.total, self.dimension))
        noise = self.noise * generator.standard_normal(self.total)
        return x, x @ generator.standard_normal(self.dimension) + noise

    def seen(self, mask: str) -> NDArray[np.int64]:
        """How many pairs each pair sees, counted from the first, int64[N]: equation 5's f(j) under `ism`."""
        pair = np.arange(self.total)
        ends = {"prefix": np.full(self.total, self.total), "ism": (pair // self.pairs + 1) * self.pairs}
        return ends[mask] if mask in ends else pair + 1


def least_squares(x: Floats, y: Floats) -> Floats:
    """w* of pairs x [..., N, D] and y [..., N], [..., D]."""
    gram = np.swapaxes(x, -1, -2) @ x
    return np.linalg.solve(gram, np.swapaxes(x, -1, -2) @ y[..., None])[..., 0]


def descend(x: Floats, y: Floats, seen: NDArray[np.int64], *, step: float, layers: Sequence[int]) -> Floats:
    """The weights of every pair after each of `layers` (ascending), [len(layers), B, N, D]. x: [B, N, D], y: [B, N]."""
    weights = np.zeros_like(x)
    rate = step / x.shape[-2]
    kept = []
    at = 0
    for layer in layers:
        for _ in range(layer - at):
            errors = y - np.einsum("bnd,bnd->bn", weights, x)
            weights = weights + rate * np.cumsum(errors[..., None] * x, axis=-2)[..., seen - 1, :]
        kept.append(weights)
        at = layer
    return np.stack(kept)


def distances(setting: Setting, seeds: Sequence[int], layers: Sequence[int]) -> dict[str, Floats]:
    """By mask the distance |w_i - w*| of every pair after each of `layers`, [len(layers), B, N]; and by `own` that of
    each group's own least squares, [B, groups].
    """
    draws = [setting.draw(seed) for seed in seeds]
    x, y = np.stack([x for x, _ in draws]), np.stack([y for _, y in draws])
    best = least_squares(x, y)
    found = {
        mask: np.linalg.norm(
            descend(x, y, setting.seen(mask), step=setting.step, layers=layers) - best[:, None], axis=-1
        )
        for mask in MASKS
    }
    shape = (len(seeds), setting.groups, setting.pairs)
    own = least_squares(x.reshape(*shape, setting.dimension), y.reshape(shape))
    return found | {"own": np.linalg.norm(own - best[:, None], axis=-1)}


def last_group(setting: Setting, found: Floats) -> Floats:
    """The mean over the pairs of the last group, [...]."""
    return found[..., -setting.pairs :].mean(axis=-1)


def run(setting: Setting, *, seed: int, draws: int) -> dict[str, Any]:
    """Everything that the JSON file holds: one draw by layer and by pair, and many draws at the last layer."""
    layers = sorted({round(float(layer)) for layer in np.geomspace(1, setting.layers, 120)})
    one = distances(setting, [seed], layers)
    many = distances(setting, range(draws), [setting.layers])
    last = {mask: last_group(setting, many[mask][-1]) for mask in MASKS}
    quartiles = {mask: np.quantile(last[mask], [0.25, 0.5, 0.75]).tolist() for mask in MASKS}
    return {
        "setting": asdict(setting) | {"seed": seed},
        "last_group": {mask: float(last_group(setting, one[mask][-1, 0])) for mask in MASKS},
        "own_least_squares": one["own"][0].tolist(),
        "by_layer": {"layers": layers} | {mask: last_group(setting, one[mask][:, 0]).tolist() for mask in MASKS},
        "by_pair": {mask: one[mask][-1, 0].tolist() for mask in MASKS},
        "draws": {
            "seeds": draws,
            "quartiles": quartiles,
            "ism_nearer_than_causal": int((last["ism"] < last["causal"]).sum()),
        },
    }


def draw(results: dict[str, Any], output: Path) -> list[Path]:
    """The picture as SVG and PNG: distance by layer on the left, by pair at the last layer on the right."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install 'ismdata[plots]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "ismdata", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    setting = results["setting"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_layer, by_pair = results["by_layer"], results["by_pair"]
    for mask in ("prefix", "ism", "causal"):
        colour = MASK_COLOURS[mask]
        end = results["last_group"][mask]
        left.plot(by_layer["layers"], by_layer[mask], color=colour, linewidth=2, label=f"{mask}: {end:.2g}")
        right.plot(range(1, len(by_pair[mask]) + 1), by_pair[mask], color=colour, linewidth=1.5, label=mask)
    own = np.repeat(results["own_least_squares"], setting["pairs"])
    right.plot(
        range(1, len(own) + 1), own, color="black", linestyle=":", linewidth=1.2, label="least squares of the group"
    )
    left.set(xscale="log", yscale="log", xlabel="layer", ylabel="distance to w*", title="Last group, mean of its pairs")
    right.set(xlabel="pair", ylabel="distance to w*", title=f"Every pair after {setting['layers']:,} layers")
    right.set_ylim(bottom=-0.05)
    for border in range(setting["pairs"], len(own), setting["pairs"]):
        right.axvline(border + 0.5, color="0.85", linewidth=0.8, zorder=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower left")
    right.legend(frameon=False, loc="upper right", fontsize=8)
    pairs = f"{setting['groups']} groups of {setting['pairs']} noisy pairs, d = {setting['dimension']}"
    figure.suptitle(f"Linear self-attention on {pairs}")
    paths = [output / f"{PICTURE_NAME}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--layers", type=int, default=Setting.layers)
    parser.add_argument("--step", type=float, default=Setting.step, help="of gradient descent on the mean square")
    parser.add_argument("--draws", type=int, default=200, help="draws of pairs for the quartiles")
    arguments = parser.parse_args()
    if arguments.layers < 1 or arguments.draws < 1 or not arguments.step > 0:
        parser.error("--layers and --draws must be 1 or more, --step above 0")
    results = run(Setting(layers=arguments.layers, step=arguments.step), seed=0, draws=arguments.draws)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"mask     last group   quartiles over {arguments.draws} draws")
    for mask in MASKS:
        low, middle, high = results["draws"]["quartiles"][mask]
        print(f"{mask:8} {results['last_group'][mask]:.3g}{'':8}{low:.3g}  {middle:.3g}  {high:.3g}")
    print(f"least squares of the last group alone: {results['own_least_squares'][-1]:.3g}")
    print(f"ism nearer than causal in {results['draws']['ism_nearer_than_causal']} of {arguments.draws} draws")
    for path in draw(results, arguments.output):
        print(path)


if __name__ == "__main__":
    main()
