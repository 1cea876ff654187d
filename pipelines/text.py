"""Summaries as text for people; `--json` prints the same summaries as they are."""

from collections.abc import Mapping
from typing import Any

from pipelines.tree import Tree


def of_step(summary: Mapping[str, Any]) -> str:
    """Return one or two lines about what a step made."""
    if summary.get("dry_run"):
        return "would " + _lines(summary)
    return _STEPS[summary["step"]](summary) + f" ({summary['seconds']:.1f} s)"


def of_pipeline(summaries: Mapping[str, Any]) -> str:
    """Return the lines of all stages."""
    return "\n".join(of_step(summary) for summary in summaries.values())


def of_tree(tree: Mapping[str, Any], indent: str = "") -> str:
    """Return a tree as indented `key: value` lines; long lists are cut."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", of_tree(value, indent + "  ")]
        elif isinstance(value, list | tuple) and len(value) > 8:
            lines.append(f"{indent}{key}: {', '.join(map(str, value[:8]))}, ... ({len(value):,} in all)")
        else:
            lines.append(f"{indent}{key}: {_value(value)}")
    return "\n".join(lines)


def of_parts(parts: Mapping[str, Any]) -> str:
    """Return what `aepipe list` says: a kind a paragraph, a knob a line."""
    lines = []
    for name, part in parts.items():
        lines.append(f"{name}: {part['about']}")
        lines += [f"    {key} = {_value(knob['default'])}    {knob['help']}" for key, knob in part.get("knobs", {}).items()]
    return "\n".join(lines)


def of_deployments(summary: Mapping[str, Any]) -> str:
    """Return what `aepipe deploy` made, a deployment a line, and how a worker is started."""
    lines = ["would deploy:"] if summary["dry_run"] else []
    lines += [f"work pool {summary['pool']['name']} ({summary['pool']['type']}): {summary['pool']['made']}"]
    lines += [f"automation {automation['name']!r}: {automation['made']}" for automation in summary["automations"]]
    for deployment in summary["deployments"]:
        when = f", {deployment['schedule']}" if deployment["schedule"] else ""
        lines.append(f"deployment {deployment['name']}: {deployment['made']}{when}")
    return "\n".join([*lines, f"a worker runs them: prefect worker start --pool {summary['pool']['name']}"])


def _shard(summary: Mapping[str, Any]) -> str:
    samples = ", ".join(f"{split} {count:,}" for split, count in summary["samples"].items())
    bad = f", {summary['quarantined']:,} in quarantine" if summary["quarantined"] else ""
    size = f"{summary['shards']:,} shards, {summary['bytes'] / 1e6:,.1f} MB"
    return f"dataset {summary['dataset']} generation {summary['generation']}: {samples} samples{bad}; {size}"


def _train(summary: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in summary["metrics"].items() if isinstance(value, float) and name not in ("lr", "beta")}
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    return f"model {summary['model']}: step {summary['steps']:,}, {metrics}; checkpoint {summary['checkpoint_sha256'][:12]}"


def _encode(summary: Mapping[str, Any]) -> str:
    bad = f", {summary['quarantined']:,} in quarantine" if summary["quarantined"] else ""
    return f"table {summary['table']} generation {summary['generation']}: {summary['rows']:,} rows in {summary['parts']:,} parts{bad}"


def _evaluate(summary: Mapping[str, Any]) -> str:
    shown = ("num_samples", "elbo", "log_likelihood", "kl", "mse", "active_units")
    numbers = ", ".join(f"{name} {_value(summary[name])}" for name in shown if summary.get(name) is not None)
    warnings = "".join(f"\nwarning: {warning}" for warning in summary.get("warnings", ()))
    return f"{summary['split']} of {summary['dataset']}: {numbers}{warnings}"


_STEPS = {"shard": _shard, "train": _train, "encode": _encode, "evaluate": _evaluate}


def _lines(summary: Tree | Mapping[str, Any]) -> str:
    rest = {key: value for key, value in summary.items() if key not in ("step", "dry_run", "seconds")}
    return f"{summary['step']}:\n{of_tree(rest, '  ')}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return "-" if value is None else str(value)
