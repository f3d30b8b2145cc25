"""What the page says about each part: plain words, plots, tables with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from robust_core.evaluation import plots
from robust_core.evaluation.metrics.accuracy import group_accuracies
from robust_core.evaluation.metrics.calibration import reliability, risk_coverage
from robust_core.evaluation.metrics.certified import certified_curve
from robust_core.evaluation.metrics.estimate import Estimate
from robust_core.evaluation.metrics.shift import Baseline
from robust_core.evaluation.report import Report

__all__ = ["Section", "Table", "interval_text", "number", "percent", "threat_text"]

MAX_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Table:
    """Header and rows of text; ``numeric`` columns are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[int] = ()


@dataclass(frozen=True)
class Plot:
    """Inline SVG with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    text: Sequence[str]
    plots: Sequence[Plot] = ()
    table: Table | None = None
    more: Sequence[Table] = ()
    notes: Sequence[str] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    examples_text: str = ""


def percent(value: float) -> str:
    """Return a share for people."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Return a number for people."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval_text(estimate: Estimate, *, share: bool = True) -> str:
    """Return the interval, or nothing where there is none."""
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f"[{100 * low:.1f}, {100 * high:.1f}] %" if share else f"[{number(low)}, {number(high)}]"


def threat_text(threat: Mapping[str, Any] | None) -> str:
    """Return the threat in plain words."""
    if threat is None:
        return ""
    eps, domain = threat["eps_text"], threat["domain"]
    inside = "" if domain is None else f" and must stay in [{domain[0]:g}, {domain[1]:g}]"
    what = {
        "Linf": f"may change every input value by up to {eps}",
        "L2": f"may move the input by a Euclidean distance of up to {eps}",
        "L1": f"may spend {eps} in all on changing input values",
    }[threat["norm"]]
    return f"Threat: {threat['norm']}, eps = {eps}. The attacker knows the model, {what}{inside}."


def _plot(figure: Figure, alt: str, part: str, which: str, caption: str) -> Plot:
    prefix = "".join(c if c.isalnum() else "-" for c in f"{part}-{which}")
    return Plot(plots.to_svg(figure, alt, f"p-{prefix}"), caption)


def _rows(report: Report, entries: Sequence[tuple[str, str]], *, share: bool = True) -> list[list[str]]:
    rows = []
    for label, name in entries:
        if name not in report.document["figures"]:
            continue
        e = report[name]
        value = "–" if math.isnan(e.value) else percent(e.value) if share else number(e.value)
        rows.append([label, value, interval_text(e, share=share), f"{e.n:,}"])
    return rows


def _table(rows: Sequence[Sequence[str]], first: str = "figure", caption: str = "") -> Table:
    return Table([first, "value", "95 % interval", "n"], rows, caption, numeric=(1, 2, 3))


def _class_name(report: Report, label: int) -> str:
    names = report.document["details"]["classes"]
    return names[label] if 0 <= label < len(names) else str(label)


def clean(report: Report, part: dict[str, Any]) -> Section:
    """Accuracy on the data as they are."""
    name = part["name"]
    rows = _rows(
        report,
        [
            ("top-1 accuracy", f"{name}/accuracy"),
            ("top-5 accuracy", f"{name}/top5_accuracy"),
            (
                f"worst class ({_class_name(report, part['data'].get('worst_class') or 0)})",
                f"{name}/worst_class_accuracy",
            ),
            (f"worst group ({part['data'].get('worst_group', '')})", f"{name}/worst_group_accuracy"),
        ],
    )
    arrays = report.arrays(name)
    per_class = group_accuracies(arrays["correct"], arrays["label"])
    attacked = _robust_per_class(report, arrays)
    order = sorted(per_class, key=lambda c: (per_class[c].value, c))
    shown = order[:MAX_CLASSES_SHOWN]
    figure = plots.per_class_plot(
        [_class_name(report, c) for c in shown],
        [per_class[c] for c in shown],
        robust=[attacked[c] for c in shown] if attacked and all(c in attacked for c in shown) else None,
    )
    worst = order[0]
    alt = f"Accuracy of each class. Worst: {_class_name(report, worst)}, {percent(per_class[worst].value)}."
    which = "" if len(order) <= MAX_CLASSES_SHOWN else f" The {MAX_CLASSES_SHOWN} worst of {len(order)} are drawn."
    caption = f"Each class with its 95 % interval, worst first.{which}"
    more = [
        [_class_name(report, c), percent(per_class[c].value), interval_text(per_class[c]), f"{per_class[c].n:,}"]
        for c in order
    ]
    return Section(
        "Clean data",
        ["How often the model is right when nobody interferes. The mean can hide a class that hardly works."],
        [_plot(figure, alt, name, "classes", caption)],
        _table(rows),
        [_table(more, "class", "Accuracy of every class")],
        [
            *part["notes"],
            "The worst class is the least of many noisy numbers; its interval holds for all classes at once.",
        ],
    )


def _robust_per_class(report: Report, clean_arrays: Mapping[str, np.ndarray]) -> dict[int, Estimate]:
    for part in report.parts("adversarial"):
        arrays = report.arrays(part["name"])
        _, a, b = np.intersect1d(clean_arrays["index"], arrays["index"], return_indices=True)
        return group_accuracies(arrays["robust"][b], clean_arrays["label"][a])
    return {}


def adversarial(report: Report, part: dict[str, Any]) -> Section:
    """Worst case over attacks."""
    name = part["name"]
    after = [k for k in report.document["figures"] if k.startswith(f"{name}/after/")]
    entries = [("accuracy under attack", f"{name}/accuracy")]
    entries += [(f"left after {k.rpartition('/')[2]}", k) for k in after]
    entries.append(("success of the attacks, of samples first right", f"{name}/attack_success"))
    data = part["data"]
    text = (
        f"A sample counts only if every attack failed on it within {data['norm']} ≤ {data['eps_text']}. Attacks run one "
        "after the other, each on the samples that are left, so the rows can only fall. This is an upper bound: a "
        "better attacker may find more."
    )
    passes = [report[f"{name}/{k}_per_sample"].value for k in ("forwards", "backwards")]
    notes = [*part["notes"], f"Spent on each sample: {passes[0]:,.0f} forward and {passes[1]:,.0f} backward passes."]
    examples = _examples(report, name)
    return Section(
        _title("Under attack", name, "adversarial"),
        [text],
        table=_table(_rows(report, entries)),
        notes=notes,
        examples=examples,
        examples_text="Samples that were right until the attacker changed them. The third picture is the change alone, "
        "around mid-grey and enlarged as stated.",
    )


def _title(title: str, name: str, usual: str) -> str:
    return title if name == usual else f"{title}: {name}"


def _examples(report: Report, name: str) -> list[dict[str, Any]]:
    arrays = {k.removeprefix("examples/"): v for k, v in report.arrays(name).items() if k.startswith("examples/")}
    found = []
    needed = ("clean", "adversarial", "label", "prediction", "index")
    if any(key not in arrays for key in needed):
        return []
    for x, x_adv, label, prediction, index in zip(*(arrays[key] for key in needed), strict=True):
        if x.ndim != 3 or x.shape != x_adv.shape or x.shape[0] not in (1, 3):
            continue
        delta = x_adv.astype(np.float64) - x
        size = float(np.abs(delta).max())
        factor = max(1, int(0.5 / size)) if size > 0 else 1
        was, now = _class_name(report, int(label)), _class_name(report, int(prediction))
        shapes = {"width": x.shape[2], "height": x.shape[1]}
        images = [
            {"src": plots.png_data_url(x), "alt": f"Sample {int(index)}, class {was}", "label": f"clean: {was}"},
            {
                "src": plots.png_data_url(x_adv),
                "alt": f"The same after the attack, taken for {now}",
                "label": f"attacked: {now}",
            },
            {
                "src": plots.png_data_url(0.5 + factor * delta),
                "alt": f"The change, times {factor}",
                "label": f"change × {factor}",
            },
        ]
        caption = (
            f"sample {int(index)}: largest change {number(size)}, Euclidean {number(float(np.sqrt((delta**2).sum())))}"
        )
        found.append({"images": [{**image, **shapes} for image in images], "caption": caption})
    return found


def security_curve(report: Report, part: dict[str, Any]) -> Section:
    """Accuracy over the attacker's radius."""
    name, data = part["name"], part["data"]
    pairs = [
        (eps, report[f"{name}/eps={label}"], label) for eps, label in zip(data["grid"], data["labels"], strict=True)
    ]
    drawn = [(eps, e) for eps, e, _ in pairs if data["grey"] is None or eps < data["grey"] or len(pairs) < 4]
    marks = [
        (p["data"]["eps"], report[f"{p['name']}/accuracy"], f"all attacks, eps = {p['data']['eps_text']}")
        for p in report.parts("adversarial")
        if p["data"].get("norm") == data["norm"] and p["data"]["eps"] <= drawn[-1][0]
    ]
    unit = f"attacker's radius eps, {data['norm']}, in units of the input"
    figure = plots.security_curve_plot([eps for eps, _ in drawn], [e for _, e in drawn], unit=unit, marks=marks)
    steps = "; ".join(f"{percent(e.value)} at {label}" for _, e, label in pairs)
    last = pairs[-1]
    text = (
        "How fast accuracy falls as the attacker gets more room. A trustworthy attack brings it down to nothing: at the "
        f"last radius ({last[2]}) every input could be turned plain grey. There {percent(last[1].value)} is left."
        if data["grey"] is not None
        else "How fast accuracy falls as the attacker gets more room."
    )
    rows = [[label, percent(e.value), interval_text(e), f"{e.n:,}"] for _, e, label in pairs]
    caption = "Accuracy against the radius; the band is the 95 % interval of each point. The last radius is in the table only."
    return Section(
        _title("Security curve", name, "security"),
        [text],
        [_plot(figure, f"Accuracy under attack: {steps}.", name, "curve", caption)],
        _table(rows, "eps"),
        notes=part["notes"],
    )


def certified(report: Report, part: dict[str, Any]) -> Section:
    """Certified accuracy over radii."""
    name, data = part["name"], part["data"]
    arrays = report.arrays(name)
    levels, accuracy = certified_curve(arrays["radius"], arrays["correct"])
    attacked = _empirical(report, data)
    unit = f"radius, {data['norm']}, in units of the input"
    figure = plots.certified_curve_plot(levels, accuracy, n=part["n"], unit=unit, attacked=attacked)
    entries = [
        (f"certified at radius {k.rpartition('@')[2]}", k)
        for k in report.document["figures"]
        if k.startswith(f"{name}/accuracy@")
    ]
    rows = _rows(report, entries) + _rows(report, [("average certified radius", f"{name}/acr")], share=False)
    status = [(k.rpartition("/")[2], k) for k in report.document["figures"] if k.startswith(f"{name}/status/")]
    alt = "Certified accuracy: " + "; ".join(f"{row[1]} {row[0][13:]}" for row in rows[:-1]) + "."
    kind = "with high probability" if data["alpha"] else "for certain"
    text = (
        f"Samples that are right and {kind} stay right for every change below the radius, whatever the attacker does. "
        f"Method: {data['method']}; it speaks of the {data['function']} function."
    )
    caption = (
        "Certified accuracy is a lower bound, attacks an upper one: the truth lies between the curve and the points."
    )
    return Section(
        _title("Certified", name, "certified"),
        [text],
        [_plot(figure, alt, name, "curve", caption)],
        _table(rows),
        [_table(_rows(report, status), "outcome", "How every sample ended")],
        part["notes"],
    )


def _empirical(report: Report, about: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Return (eps, accuracy, label) of the attacks on the same function and norm."""
    found = []
    for part in (*report.parts("security-curve"), *report.parts("adversarial")):
        data, name = part["data"], part["name"]
        if any(data.get(k) != about.get(k) for k in ("fingerprint", "norm")):
            continue
        if part["kind"] == "adversarial":
            found.append((data["eps"], report[f"{name}/accuracy"].value, "left by attacks"))
            continue
        grid = zip(data["grid"], data["labels"], strict=True)
        found += [
            (eps, report[f"{name}/eps={label}"].value, "left by attacks") for eps, label in grid if eps != data["grey"]
        ]
    return found


def corruptions(report: Report, part: dict[str, Any]) -> Section:
    """Fifteen corruptions at five severities."""
    name, data = part["name"], part["data"]
    names, severities = data["names"], data["severities"]
    grid = np.array([[report[f"{name}/{c}/{s}"].value for s in severities] for c in names])
    figure = plots.corruption_heat_map(names, severities, grid)
    alt = "Accuracy by corruption and severity: " + "; ".join(
        f"{c.replace('_', ' ')} {100 * row[0]:.0f} to {100 * row[-1]:.0f}" for c, row in zip(names, grid, strict=True)
    )
    entries = [
        ("mean accuracy", f"{name}/accuracy"),
        (f"worst: {data['worst'].replace('_', ' ')}", f"{name}/worst_accuracy"),
    ]
    entries += [
        (f"family: {k.rpartition('/')[2]}", k) for k in report.document["figures"] if k.startswith(f"{name}/family/")
    ]
    rows = _rows(report, entries) + _rows(
        report, [("mCE", f"{name}/mce"), ("relative mCE", f"{name}/relative_mce")], share=False
    )
    every = [[f"{c.replace('_', ' ')}, severity {s}", f"{name}/{c}/{s}"] for c in names for s in severities]
    notes = list(part["notes"])
    if data["reference"]:
        notes.append(f"mCE is relative to {data['reference']}: 1 means as many errors as it makes, less is better.")
    return Section(
        _title("Common corruptions", name, "corruptions"),
        ["Accidents rather than attacks: noise, blur, weather and digital artefacts, each at rising severity."],
        [_plot(figure, alt + ".", name, "map", f"Accuracy in percent (constants: profile {data['profile']}).")],
        _table(rows),
        [_table(_rows(report, [(a, b) for a, b in every]), "corruption", "Every corruption and severity")],
        notes,
    )


def calibration(report: Report, part: dict[str, Any]) -> Section:
    """Confidence against accuracy."""
    name = part["name"]
    arrays = report.arrays(name)
    diagram = reliability(arrays["confidence"], arrays["correct"], n_bins=part["data"]["n_bins"])
    coverage, risk = risk_coverage(arrays["confidence"], arrays["correct"])
    ece, limit = report[f"{name}/ece"], report[f"{name}/ece_limit"]
    verdict = (
        "more than sampling noise explains: the confidences are off"
        if ece.value > limit.value
        else "what a perfectly calibrated model could show by chance"
    )
    overall = float(np.nansum((diagram.confidence - diagram.accuracy) * diagram.count) / max(1, diagram.count.sum()))
    tendency = f"{'too sure of itself' if overall > 0 else 'too modest'}, by {percent(abs(overall))}"
    if abs(overall) < 0.005:
        tendency = "neither too sure of itself nor too modest"
    text = (
        f"Among predictions made with confidence 80 %, four in five should be right. The mean gap (ECE) is {percent(ece.value)}; "
        f"with this many samples up to {percent(limit.value)} can be chance, so this is {verdict}. On the whole the model "
        f"is {tendency}."
    )
    entries = [
        ("expected calibration error (ECE)", "ece"),
        ("adaptive ECE", "adaptive_ece"),
        ("class-wise ECE", "classwise_ece"),
    ]
    rows = _rows(report, [(label, f"{name}/{k}") for label, k in entries])
    more = [
        ("negative log-likelihood (nats)", "nll"),
        ("Brier score", "brier"),
        ("area under risk-coverage (AURC)", "aurc"),
    ]
    more += [
        ("temperature, fitted on held-out data", "temperature"),
        ("ECE at that temperature", "scaled/ece"),
        ("NLL at that temperature", "scaled/nll"),
    ]
    rows += _rows(report, [(label, f"{name}/{k}") for label, k in more], share=False)
    half = float(risk[(len(risk) - 1) // 2])
    return Section(
        _title("Confidence", name, "calibration"),
        [text],
        [
            _plot(
                plots.reliability_diagram(diagram),
                f"Reliability diagram: mean gap between confidence and accuracy {percent(ece.value)}.",
                name,
                "reliability",
                "Dots below the dashed line: too confident. The larger the dot, the more predictions.",
            ),
            _plot(
                plots.risk_coverage_plot(coverage, risk),
                f"Risk against coverage: error {percent(half)} among the more confident half, {percent(float(risk[-1]))} over all.",
                name,
                "risk",
                f"If only the more confident half is answered, {percent(half)} of the answers are wrong; over all, {percent(float(risk[-1]))}.",
            ),
        ],
        _table(rows),
        notes=part["notes"],
    )


def shift(report: Report, part: dict[str, Any]) -> Section:
    """Another data set of the same classes."""
    name, line = part["name"], part["data"]["baseline"]
    baseline = None
    if line is not None:
        baseline = Baseline(
            line["slope"], line["intercept"], line["domain"], tuple(line["acc_id"]), tuple(line["acc_shift"])
        )
    plotted = []
    if f"{name}/id_accuracy" in report.document["figures"]:
        x, y = report[f"{name}/id_accuracy"].value, report[f"{name}/accuracy"].value
        figure = plots.shift_scatter([(report.document["model"][:24], x, y)], baseline=baseline)
        alt = f"{percent(x)} in distribution, {percent(y)} under the shift."
        plotted.append(
            _plot(
                figure,
                alt,
                name,
                "scatter",
                "Above the line of the baselines: more robust than their accuracy explains.",
            )
        )
    entries = [
        ("accuracy under the shift", "accuracy"),
        ("accuracy in distribution", "id_accuracy"),
        ("effective robustness ρ", "effective_robustness"),
    ]
    entries += [("relative robustness τ", "relative_robustness"), ("ECE under the shift", "ece")]
    rows = _rows(report, [(label, f"{name}/{k}") for label, k in entries])
    rows += _rows(report, [("NLL under the shift", f"{name}/nll")], share=False)
    text = f"The same classes in other data ({part['data']['data']}). Nobody attacks; the world has moved."
    if baseline is not None:
        text += f" The line was fitted over {len(baseline.acc_id)} declared baseline models in the {baseline.domain} domain."
    return Section(f"Shift: {name}", [text], plotted, _table(rows), notes=part["notes"])


def open_set(report: Report, part: dict[str, Any]) -> Section:
    """Unknown inputs."""
    name, data = part["name"], part["data"]
    entries = [
        ("AUROC (50 % is guessing)", "auroc"),
        ("AUPR, unknown positive", "aupr_out"),
        ("AUPR, known positive", "aupr_in"),
    ]
    entries += [("known inputs rejected when 95 % of the unknown are noticed (FPR95)", "fpr95")]
    group = f" ({data['group']})" if data["group"] else ""
    text = (
        f"Can the model's own score tell {data['n_unknown']:,} unknown inputs{group} from {data['n_known']:,} known ones? "
        "AUROC is the chance that a random unknown input looks stranger than a random known one."
    )
    rows = _rows(report, [(label, f"{name}/{k}") for label, k in entries])
    return Section(_title("Unknown inputs", name, "open-set"), [text], table=_table(rows), notes=part["notes"])


def translation(report: Report, part: dict[str, Any]) -> Section:
    """Shifts by a few pixels."""
    name = part["name"]
    entries = []
    for k in (k for k in report.document["figures"] if k.startswith(f"{name}/consistency@")):
        size = k.rpartition("@")[2]
        entries += [
            (f"same prediction, shifts up to {size} px", k),
            (f"right under all of them, {size} px", f"{name}/accuracy@{size}"),
        ]
    text = "Share of samples whose prediction stays the same under every shift by whole pixels, diagonals included. All were tried."
    return Section(
        _title("Small translations", name, "translation"),
        [text],
        table=_table(_rows(report, entries)),
        notes=part["notes"],
    )


def other(report: Report, part: dict[str, Any]) -> Section:
    """Figures of a part that this page does not know."""
    prefix = f"{part['name']}/"
    names = [k for k in report.document["figures"] if k.startswith(prefix)]
    rows = _rows(report, [(k.removeprefix(prefix), k) for k in names], share=False)
    return Section(part["name"], [], table=_table(rows), notes=part["notes"])


def invariant(report: Report) -> Section | None:
    """Certificates beside attacks."""
    comparisons = report.comparisons()
    if not comparisons:
        return None
    rows = [
        [f"{c.certified} against {c.attacked}", f"{c.n:,}", f"{len(c.violations)}", f"{c.limit}"] for c in comparisons
    ]
    text = (
        "No attack may break a sample within the radius that a certificate of the same function promises. Every pair was "
        "compared, sample by sample."
    )
    header = ["pair", "certified and attacked", "broken", "explained by chance"]
    return Section("Certificates against attacks", [text], table=Table(header, rows, numeric=(1, 2, 3)))
