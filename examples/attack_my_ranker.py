"""Attack a ranker, promise what no synonym can change, and measure both: your ranker, your files."""

from ir_robust.attacks.run import attack_run
from ir_robust.attacks.spam import Deletion, TermSpamming
from ir_robust.certdr import PerturbationTable, SynonymGraph
from ir_robust.certdr.report import certify_report
from ir_robust.collection import load_collection
from ir_robust.evaluation import evaluate_runs
from ir_robust.rankers import BM25Index, BM25Ranker, rerank

data = load_collection("lee")  # or read_collection("docs.tsv", "topics.tsv", "qrels.txt"), "beir:FOLDER", "irds:ID"
index = BM25Index(data.docs)
run = index.retrieve(data)  # or read_run("bm25.trec")
ranker = BM25Ranker(BM25Index(data.docs, k1=0.6, b=0.3))  # or any function of (query, documents)

report = evaluate_runs({"bm25": run, "mine": rerank(ranker, data, run)}, data.qrels)
gain = report["mine/nDCG@10_gain"]
print(f"nDCG@10 {report['mine/nDCG@10'].value:.3f}, against the first stage {gain.value:+.3f} {gain.interval}")

attacked = attack_run(ranker, data, run, {"spam": TermSpamming(), "deletion": Deletion()}, k=10, targets=2)
print(f"ten words more bring {attacked['spam/entry'].value:.0%} of documents into the top ten;")
print(f"leaving a tenth of the words out, {attacked['deletion/entry'].value:.0%}")

synonyms = SynonymGraph.from_pairs([("attack", "raid"), ("police", "officers"), ("government", "administration")])
certified = certify_report(ranker, PerturbationTable(synonyms), data, run, (1, 10), n_samples=100)
print(f"certified against these synonyms: K = 1 for {certified['CRQ@1'].value:.0%} of queries,")
print(f"K = 10 for {certified['CRQ@10'].value:.0%}, at {certified['smoothed/nDCG@10_gain'].value:+.3f} nDCG@10")
