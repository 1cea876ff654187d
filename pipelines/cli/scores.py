"""The table of `aepipe evaluate`: one score per line, with its unit or meaning."""

from collections.abc import Iterator, Mapping
from typing import Any

Row = tuple[str, str, str]
SHOWN_DIMENSIONS = 12


def of_evaluation(summary: Mapping[str, Any]) -> str:
    """Return the scores of a summary as aligned lines, then lineage and warnings; scores that were not computed are omitted."""
    rows, notes = list(_rows(summary)), [*_figures(summary.get("figures")), ("lineage", _lineage(summary["lineage"]))]
    wide, high = max(len(row[0]) for row in [*rows, *notes]), max(len(value) for name, value, _ in rows if name != "KL per dimension")
    lines = [f"  {name:<{wide}}  {value:>{high}}  {about}".rstrip() for name, value, about in rows]
    lines += [f"  {name:<{wide}}  {note}" for name, note in notes]
    drawn = ", drawn black or white" if summary["binarize"] == "dynamic" else ""
    head = f"{summary['split']} of {summary['dataset']}, {summary['num_samples']:,} samples{drawn} ({summary['seconds']:.1f} s)"
    return "\n".join([head, *lines, *(f"warning: {warning}" for warning in summary["warnings"])])


def _figures(figures: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if figures is not None:
        yield "figures", f"{figures['url']}: {', '.join(name.removesuffix('.png') for name in figures['files'])}"
        yield from (("not drawn", f"{name}: {reason}") for name, reason in figures["left_out"].items())


def _rows(summary: Mapping[str, Any]) -> Iterator[Row]:
    likelihood = summary["likelihood"]
    yield from _row("elbo", summary["elbo"], "nats, one sample of the posterior, beta 1", ".4f")
    yield from _row("log p(x|z)", summary["log_likelihood"], f"nats, {likelihood}", ".4f")
    yield from _row("KL", summary["kl"], "nats", ".4f")
    if summary["kl_per_dimension"] is not None:
        yield _per_dimension(summary["kl_per_dimension"])
        yield "active units", str(summary["active_units"]), f"of {len(summary['kl_per_dimension'])}"
    yield from _row(f"log p(x), IWAE-{summary['iwae']}", summary["log_marginal"], "nats, a lower bound with all constants", ".4f")
    yield from _row("mse", summary["mse"], "per value, without sampling", ".6f")
    if summary["perplexity"] is not None:
        yield "codebook perplexity", f"{summary['perplexity']:.2f}", f"{summary['codes_used']:,} entries in use"
    yield from _probes(summary["probe"])
    yield from _disentanglement(summary["disentanglement"])


def _row(name: str, value: float | None, about: str, form: str) -> Iterator[Row]:
    if value is not None:
        yield name, format(value, form), about


def _per_dimension(kl: list[float]) -> Row:
    """Return the largest ones with their dimensions."""
    order = sorted(range(len(kl)), key=lambda dimension: -kl[dimension])
    shown = "  ".join(f"{dimension}: {kl[dimension]:.2f}" for dimension in order[:SHOWN_DIMENSIONS])
    return "KL per dimension", shown, f"... ({len(kl)} in all)" if len(kl) > SHOWN_DIMENSIONS else ""


def _probes(probe: Mapping[str, Any] | None) -> Iterator[Row]:
    if probe is not None:
        about = f"accuracy, {probe['classes']} classes, {probe['column']} of {probe['train_samples']:,} samples of {probe['train_split']}"
        yield "linear probe", f"{probe['linear']:.4f}", about
        yield f"{probe['neighbours']}-NN", f"{probe['knn']:.4f}", about


def _disentanglement(found: Mapping[str, Any] | None) -> Iterator[Row]:
    if found is not None:
        yield "MIG", f"{found['mig']:.4f}", f"{', '.join(found['factors'])}; {found['samples']:,} samples, {found['mig_bins']} bins"
        for name, value in (found["dci"] or {}).items():
            yield f"DCI {name}", f"{value:.4f}", ""
        yield "FactorVAE score", f"{found['factor_vae']:.4f}", ""


def _lineage(lineage: Mapping[str, Any]) -> str:
    checkpoint, dataset = lineage["checkpoint"], lineage["dataset"]
    return (
        f"checkpoint {checkpoint['sha256'][:12]} of step {checkpoint['step']:,}, "
        f"dataset {dataset['sha256'][:12]} of generation {dataset['number']}"
    )
