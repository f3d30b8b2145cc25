"""The page of certified lists."""

from __future__ import annotations

from ir_robust.pages import plots
from ir_robust.pages.common import all_figures, card, points, provenance, value_of
from ir_robust.report import RankingReport
from robust_core.evaluation.layout import Card, Page
from robust_core.evaluation.sections.base import Section, Table, interval_text, number, percent, plot_of

__all__ = ["render"]


def render(report: RankingReport) -> str:
    """Return the page."""
    d, details = report.document, report.document["details"]
    return Page(
        title=f"{d['model']} on {d['data']}, certified against synonyms",
        lead=(
            f"{d['n']:,} queries · {details['settings']['n_samples']:,} samples at most · seed {d['seed']} · "
            f"{d['device']}"
        ),
        intro=[_promise(report)],
        cards=_cards(report),
        flags=d["flags"],
        clear="Checked: no substitute leaves its component, scores in [0, 1], confidence joint over each list.",
        note=(
            "Brackets are exact 95 % intervals (Clopper–Pearson) of shares of queries, and of the bootstrap over "
            "queries for measures. They say how far other queries could fare otherwise; the promise itself is made to "
            "each query."
        ),
        sections=[_shares(report), _table(report), *_price(report)],
        provenance=provenance(report, "runs/ (lists by smoothed score, TREC)", _settings(report)),
        command=d["command"],
        tables=[all_figures(report), ("Every query", _queries(report))],
    ).html()


def _promise(report: RankingReport) -> str:
    threat, settings = report.document["threat"], report.document["details"]["settings"]
    return (
        f"Promise, for each certified query and K: whoever rewrites documents below rank K, {threat['budget_text']} by "
        "words of the table, brings none of them into the first K of the smoothed ranker. It holds with probability at "
        f"least {1 - settings['alpha']:g} over the draws, for all K of a query together. Nothing is promised about the "
        "order inside the first K, about edits of the query or of documents inside, or about added and deleted words."
    )


def _cards(report: RankingReport) -> list[Card]:
    details = report.document["details"]
    ks = details["settings"]["ks"]
    cards = [card(f"queries certified for K = {k}", report[f"CRQ@{k}"], share=True) for k in ks[:3]]
    table = details["table"]
    cards.append(Card("largest component of synonyms", f"{table['largest']}", f"cap {table['cap']}"))
    if details["measures"]:
        measure = details["measures"][0]
        cards.append(card(f"{measure} that smoothing changes", report[f"smoothed/{measure}_gain"]))
    else:
        cards.append(Card("what smoothing costs", "", how="add --qrels"))
    return cards


def _shares(report: RankingReport) -> Section:
    ks = report.document["details"]["settings"]["ks"]
    rows = [[str(k), value_of(report[f"CRQ@{k}"], share=True), interval_text(report[f"CRQ@{k}"])] for k in ks]
    alt = "; ".join(f"K = {row[0]}: {row[1]}" for row in rows)
    plot = plot_of(
        plots.trade_off(ks, [report[f"CRQ@{k}"] for k in ks]), f"{alt}.", "crq", "curve", "Certified queries."
    )
    text = "The share of queries for which nobody enters the first K: comparable only at the same table and budget."
    return Section(
        "Certified robust queries", [text], [plot], Table(["K", "CRQ@K", "95 % interval"], rows, numeric=(0, 1, 2))
    )


def _table(report: RankingReport) -> Section:
    """Tell how strong the assumed attacker is: a small table certifies everything and promises little."""
    t = report.document["details"]["table"]
    rows = [
        ["synonyms from", t["source"]],
        ["threshold of similarity", "none" if t["threshold"] is None else f"{t['threshold']:g}"],
        ["edges", f"{t['edges']:,} ({t['kind']})"],
        ["words with a synonym", f"{t['words']:,}"],
        ["largest component", f"{t['largest']:,}"],
        ["components of 2, 3–10, 11–100, more words", " / ".join(f"{n:,}" for n in t["sizes"])],
        ["cap of the set a word is drawn from", f"{t['cap']:,}"],
        ["words whose sets overlap in part only", f"{t['loose']:,}"],
        ["share of a document's words that are drawn", percent(t["replaceable"])],
        ["budget (δ)", report.document["threat"]["budget_text"]],
        ["mean deviation o_d, before anything is drawn", number(t["deviation"])],
        ["documents with o_d = 0", percent(t["free"])],
    ]
    text = (
        "The certificate speaks of this table and no other. Where all components fit the cap, a substitution does not "
        "change the smoothed score at all, and the certificate asks only whether the gap exceeds the sampling error."
    )
    return Section("The attacker that is assumed", [text], table=Table(["what", "value"], rows))


def _price(report: RankingReport) -> list[Section]:
    measures = report.document["details"]["measures"]
    if not measures:
        return []
    rows = []
    for measure in measures:
        cells = [*points(report[f"plain/{measure}"]), *points(report[f"smoothed/{measure}"])]
        rows.append([measure, *cells, *points(report[f"smoothed/{measure}_gain"])])
    header = ["measure", "plain", "95 % interval", "smoothed", "95 % interval", "difference", "95 % interval"]
    text = "What the promise costs: the same lists by the plain ranker and by the smoothed one, paired by query."
    return [Section("What smoothing costs", [text], table=Table(header, rows, numeric=range(1, 7)))]


def _settings(report: RankingReport) -> list[tuple[str, str]]:
    settings = report.document["details"]["settings"]
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("squash", "seed"))
    return [
        ("settings", told),
        ("map to [0, 1]", str(settings["squash"])),
        ("table", report.document["threat"]["table_sha256"]),
    ]


def _queries(report: RankingReport) -> Table:
    ks = [str(k) for k in report.document["details"]["settings"]["ks"]]
    rows = []
    for row in report.document["details"]["queries"]:
        verdicts = []
        for k in ks:
            c = row["certificates"][k]
            margin = "" if c["margin"] is None else f" ({c['margin']:+.3g})"
            verdicts.append(f"{'yes' if c['certified'] else 'no'}{margin}")
        rows.append([row["qid"], *verdicts, number(row["deviation"]), f"{row['n_scores']:,}"])
    return Table(
        ["query", *(f"K = {k} (margin)" for k in ks), "max o_d", "scores"], rows, numeric=range(1, len(ks) + 3)
    )
