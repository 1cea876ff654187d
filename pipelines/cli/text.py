"""Formats summaries as text; `--json` prints the same summaries as JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aecore.artifact.root import STAGES
from aecore.registry import BOUNDS
from pipelines.recipe.yaml import Tree

SHOWN = 8


def changed(data: Any, change: Callable[[str], str]) -> Any:
    """Return plain data with `change` applied to every text in it, keys too."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, Mapping):
        return {changed(key, change): changed(value, change) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [changed(value, change) for value in data]
    return data


def of_step(summary: Mapping[str, Any]) -> str:
    """Return one or two lines about the result of a step."""
    if summary.get("dry_run"):
        return "would " + _lines(summary)
    first, *rest = _STEPS[summary["step"]](summary).split("\n")
    return "\n".join([f"{first} ({summary['seconds']:.1f} s)", *rest])


def of_pipeline(summaries: Mapping[str, Any]) -> str:
    """Return the lines of all steps, and whether there was nothing to do."""
    made = [summary["made"] for summary in summaries.values() if "made" in summary]
    nothing = [] if any(made) or not made else ["nothing new: no run was trained, and the table is up to date"]
    return "\n".join([*map(of_step, summaries.values()), *nothing])


def of_tree(tree: Mapping[str, Any], indent: str = "") -> str:
    """Return a tree as indented `key: value` lines; long lists are cut."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", of_tree(value, indent + "  ")]
        elif isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
            named = {str(number): each for number, each in enumerate(value, 1)} if len(value) > 1 else value[0]
            lines += [f"{indent}{key}:", of_tree(named, indent + "  ")]
        elif isinstance(value, list | tuple) and len(value) > 8:
            lines.append(f"{indent}{key}: {', '.join(map(str, value[:8]))}, ... ({len(value):,} in all)")
        else:
            lines.append(f"{indent}{key}: {_value(value)}")
    return "\n".join(lines)


def of_show(tree: Mapping[str, Any]) -> str:
    """Return the output of `aepipe show`: a tree, in which the report of a dataset is put into sentences and long counts are cut."""
    return of_tree(_for_people(tree))


def _for_people(tree: Mapping[str, Any]) -> Tree:
    shown: Tree = {}
    for key, value in tree.items():
        if key == "report" and isinstance(value, Mapping):
            shown[key] = value["state"] if "state" in value else _report(value)
        elif key in ("shapes", "extensions", "reasons") and isinstance(value, Mapping) and value:
            shown[key] = _numbers(value)
        else:
            shown[key] = _for_people(value) if isinstance(value, Mapping) and key in STAGES else value
    return shown


def _report(report: Mapping[str, Any]) -> Tree:
    """Return a report as a few lines."""
    counts, pixels = report["counts"], report["pixels"]
    left = f"; {report['left_out']:,} left out, whose content others have" if report["left_out"] else ""
    classes = {split: _numbers(found) for split, found in counts["classes"].items() if found}
    kind = "all" if pixels["exact"] else f"{pixels['samples']:,} of {pixels['of']:,}, chosen by a hash of the key"
    values = {
        f"{each['dtype']}, {_count(each['channels'], 'channel')}": f"mean {_brief(each['mean'])}, std {_brief(each['std'])}"
        for each in pixels["formats"]
    }
    return {
        "samples": _numbers(counts["splits"]) + left,
        **({"classes": classes} if classes else {}),
        "sizes": _numbers(counts["sizes"]),
        "modes": _numbers(counts["modes"]),
        "equal content": _equal(report["duplicates"]),
        "in two splits": _equal(report["leaks"]),
        "of two classes": _equal(report["contradicting_labels"]),
        "tiny images": _unusual(report["tiny"]),
        "odd images": _unusual(report["odd"]),
        "training samples": {
            "looked at": kind,
            **values,
            "constant": f"{pixels['constant']['samples']:,}" + _for_example(pixels["constant"]["examples"]),
            **({"unreadable": pixels["unreadable"]} if pixels["unreadable"] else {}),
        },
        "seconds": ", ".join(f"{name} {seconds:.2f}" for name, seconds in report["seconds"].items()),
    }


def _equal(facts: Mapping[str, Any]) -> str:
    if not facts["contents"]:
        return "none"
    example = facts["examples"][0]
    keys = example if isinstance(example, list) else [f"{name}: {', '.join(keys)}" for name, keys in example.items()]
    found = f"{_count(facts['samples'], 'sample')} of {_count(facts['contents'], 'content')}"
    if facts["remaining"] < facts["contents"]:  # the others are left out
        found = f"{facts['remaining'] or 'none'} in the dataset; in the source {found}"
    return f"{found}, for example {' = '.join(keys)}"


def _unusual(facts: Mapping[str, Any]) -> str:
    if not facts["samples"]:
        return "none"
    return f"{facts['samples']:,} ({_numbers(facts['formats'])}){_for_example(facts['examples'])}"


def _for_example(keys: Sequence[str]) -> str:
    return f", for example {', '.join(keys[:3])}" if keys else ""


def _numbers(counts: Mapping[str, int]) -> str:
    """Return `a 3, b 2`, the largest first, cut after some."""
    order = sorted(counts.items(), key=lambda item: -item[1])
    more = f", ... ({len(order):,} in all)" if len(order) > SHOWN else ""
    return ", ".join(f"{name} {count:,}" for name, count in order[:SHOWN]) + more if order else "-"


def _brief(values: Sequence[float]) -> str:
    cut = ", ..." if len(values) > SHOWN else ""
    return ", ".join(f"{value:.4g}" for value in values[:SHOWN]) + cut


def of_files(found: Mapping[str, Any]) -> str:
    """Return the paths of a table's files, one a line, or the SQL of a view of them."""
    return str(found["sql"]) if "sql" in found else "\n".join(found["files"])


def of_parts(parts: Mapping[str, Any]) -> str:
    """Return the output of `aepipe list`: one paragraph per part, one line per knob with default, meaning, type and bounds."""
    paragraphs = []
    for name, part in parts.items():
        read_by = f" (read by {', '.join(part['steps'])})" if part.get("steps") else ""
        settings = {key: f"{key} = {_yaml(knob['default'])}" for key, knob in part.get("knobs", {}).items()}
        width = max(map(len, settings.values()), default=0)
        lines = [f"{name}: {part['about']}{read_by}"]
        for key, knob in part.get("knobs", {}).items():
            bounds = " and ".join(f"{sign} {_value(knob[name])}" for name, sign in BOUNDS.items() if name in knob)
            takes = f"{knob['type']} {bounds}".rstrip()
            lines.append(f"    {settings[key]:<{width}}    {knob['help']} ({takes})")
        paragraphs.append("\n".join(lines))
    return ("\n\n" if any(part.get("knobs") for part in parts.values()) else "\n").join(paragraphs)


def _yaml(value: Any) -> str:
    """Return a default as a recipe writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) or value == "" else _value(value)


def of_deployments(summary: Mapping[str, Any]) -> str:
    """Return what `aepipe deploy` did, one line per deployment, and how to start a worker."""
    lines = ["would deploy:"] if summary["dry_run"] else []
    lines += [f"work pool {summary['pool']['name']} ({summary['pool']['type']}): {summary['pool']['made']}"]
    lines += [f"automation {automation['name']!r}: {automation['made']}" for automation in summary["automations"]]
    for deployment in summary["deployments"]:
        when = f", {deployment['schedule']}" if deployment["schedule"] else ""
        lines.append(f"deployment {deployment['name']}: {deployment['made']}{when}")
    return "\n".join([*lines, f"a worker runs them: prefect worker start --pool {summary['pool']['name']}"])


def _shard(summary: Mapping[str, Any]) -> str:
    samples = ", ".join(f"{split} {count:,}" for split, count in summary["samples"].items())
    bags = f" in {_count(sum(summary['bags'].values()), 'bag')}" if "bags" in summary else ""
    bad = f", {summary['quarantined']:,} in quarantine" if summary["quarantined"] else ""
    removed = sum(summary.get("removed", {}).values()) + summary.get("removed_quarantined", 0)
    gone = f", {removed:,} removed" if removed else ""
    size = f"{_count(summary['shards'], 'shard')}, {_size(summary['bytes'])}"
    noun = "sample" if sum(summary["samples"].values()) == 1 else "samples"
    return f"dataset {summary['dataset']} generation {summary['generation']}: {samples} {noun}{bags}{bad}{gone}; {size}"


def _train(summary: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in summary["metrics"].items() if isinstance(value, float) and name not in ("lr", "beta")}
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    means = f"means of epoch {summary['epoch']}: {metrics}; " if numbers else ""
    done = "" if summary["made"] else "finished already, "
    return f"model {summary['model']}: {done}step {summary['steps']:,}; {means}checkpoint {summary['checkpoint_sha256'][:12]}"


def _encode(summary: Mapping[str, Any]) -> str:
    bad = f", {summary['quarantined']:,} in quarantine" if summary["quarantined"] else ""
    new = "" if summary["made"] else "nothing new, "
    rows = f"{_count(summary['rows'], 'row')} in {_count(summary['parts'], 'part')}"
    return f"table {summary['table']} generation {summary['generation']}: {new}{rows}{bad}"


def _evaluate(summary: Mapping[str, Any]) -> str:
    if "not_evaluated" in summary:
        return f"{summary['dataset']}: not evaluated: {summary['not_evaluated']}"
    shown = ("num_samples", "elbo", "log_likelihood", "kl", "mse", "active_units")
    numbers = ", ".join(f"{name} {_value(summary[name])}" for name in shown if summary.get(name) is not None)
    warnings = "".join(f"\nwarning: {warning}" for warning in summary.get("warnings", ()))
    return f"{summary['split']} of {summary['dataset']}: {numbers}{warnings}"


def _generate(summary: Mapping[str, Any]) -> str:
    what = f"{_count(summary['num'], 'sample' if summary['step'] == 'sample' else 'decoded latent')} of shape {_value(summary['shape'])}"
    files = _count(summary["files"], "file") if summary["made"] else "all there already"
    return f"{summary['out']}: {what}, {files}; checkpoint {summary['checkpoint'][:12]}"


_STEPS = {
    "shard": _shard,
    "adopt": _shard,
    "train": _train,
    "encode": _encode,
    "evaluate": _evaluate,
    "sample": _generate,
    "decode": _generate,
}


def _lines(summary: Tree | Mapping[str, Any]) -> str:
    rest = {key: value for key, value in summary.items() if key not in ("step", "dry_run", "seconds")}
    return f"{summary['step']}:\n{of_tree(rest, '  ')}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return "-" if value is None or value == {} else str(value)


def of_compare(tree: Mapping[str, Any]) -> str:
    """Return the output of `aepipe compare`: values of both sides on one line, hashes shortened, empty entries omitted."""
    return of_tree(_compact(tree))


def _compact(tree: Mapping[str, Any]) -> Tree:
    shown: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value.keys() & {"a", "b"} and value.keys() <= {"a", "b", "delta"}:
            change = f" ({value['delta']:+.6g})" if "delta" in value else ""
            shown[key] = f"{_value(value['a'])} | {_value(value['b'])}{change}"
        elif isinstance(value, Mapping):
            inner = _compact(value)
            if inner:
                shown[key] = inner
        elif value == [] or value is None:
            continue
        else:
            shown[key] = [_short(each) for each in value] if isinstance(value, list) else _short(value)
    return shown


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def of_doctor(report: Mapping[str, Any]) -> str:
    """Return one line per check, with its remedy if it has one."""
    lines = []
    for check in report["checks"]:
        remedy = f"; {check['remedy']}" if check["remedy"] else ""
        lines.append(f"{check['state']:<8} {check['name']}: {check['message']}{remedy}")
    counts = ", ".join(f"{report[state]} {state}" for state in ("ok", "warning", "failed", "skipped"))
    return "\n".join([*lines, counts])


def of_gc(report: Mapping[str, Any]) -> str:
    """Return the output of `aepipe gc`: one line per reason for what was removed, what is kept for now, and what is unknown."""
    if "stages" in report:
        lines = [of_gc(stage) for stage in report["stages"].values()]
        later = report.get("superseded_later", ())
        lines += [f"  superseded, kept for now (the retention is not over): {', '.join(later)}"] if later else []
        return "\n".join([*lines, *_left_alone(report, "left alone (not dataset/, run/ or table/ of this root)")])
    done = "would remove" if report["dry_run"] else "removed"
    lines = _of_compaction(report["compaction"]) if "compaction" in report else []
    lines.append(f"{report['kind']} {report['url']}: {done} {_count(report['files'], 'file')}, {_size(report['bytes'])}")
    for why in dict.fromkeys(item["why"] for item in report["garbage"]):
        items = [item for item in report["garbage"] if item["why"] == why]
        names = ", ".join(item["name"] for item in items[:4]) + (", ..." if len(items) > 4 else "")
        lines.append(f"  {_count(len(items), 'file')}, {_size(sum(item['bytes'] for item in items))}, {why}: {names}")
    lines += [
        f"  left: {item['what']}, {_count(item['files'], 'file')}, {_size(item['bytes'])}, {item['why']}" for item in report["waiting"]
    ]
    return "\n".join([*lines, *_left_alone(report, "not ours, left alone")])


def _of_compaction(told: Mapping[str, Any]) -> list[str]:
    """Return a line of what was written again, one for each part, and one of adopted tars that were not."""
    done, parts = "would write" if told["dry_run"] else "wrote", told["parts"]
    removed, size = (sum(part[name] for part in parts) for name in ("removed", "bytes"))
    where = "" if told["dry_run"] or not parts else f" as generation {told['generation']}"
    lines = [f"dataset {told['url']}: {done} {_count(len(parts), 'part')} again{where}, without {_count(removed, 'removed sample')}"]
    lines += [
        f"  {part['part']} -> {part['by'] or 'nothing is left'}, {part['live']:,} of {part['live'] + part['removed']:,}" for part in parts
    ]
    if parts:
        lines.append(f"  the old files ({_size(size)}) stay for readers of older generations: see --retention and --keep-generations")
    if told["adopted"]:
        names = ", ".join(told["adopted"][:4]) + (", ..." if len(told["adopted"]) > 4 else "")
        lines.append(f"  left: {_count(len(told['adopted']), 'part')} of adopted tars ({names}), which --copy copies")
    if told["left_out"]:
        lines.append(f"  left: {_count(len(told['left_out']), 'part')} with samples that come back when another of their content goes")
    return lines


def _left_alone(report: Mapping[str, Any], why: str) -> list[str]:
    names = report["not_ours"]
    shown = ", ".join(names[:8]) + (f", ... ({len(names):,} in all)" if len(names) > 8 else "")
    return [f"  {why}: {shown}"] if names else []


def _count(number: int, one: str) -> str:
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    return f"{num_bytes:,.0f} {units[0]}" if units[0] == "bytes" else f"{num_bytes:,.1f} {units[0]}"
