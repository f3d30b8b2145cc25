"""Erase a concept from a diffusion pipeline, attack the erasure, and see what it cost: your pipeline, your prompts."""

from diffusion_unlearn.attacks import RandomPrefix, Synonyms
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.erasure import erase
from diffusion_unlearn.evaluation import evaluate_erasure
from diffusion_unlearn.judges import judge_digit
from diffusion_unlearn.prompts import PromptSet

# untrained, so that this runs in seconds: digits_pipeline() is trained in minutes, yours is from_pretrained(FOLDER)
pipe = build_pipeline()
erased = erase(pipe, "three", method="uce", templates=["{}", "a photo of {}"], retain=["one", "two"])
erased.save_pretrained("erased")  # loads in plain diffusers

report = evaluate_erasure(
    erased,
    PromptSet.of(["three", "a photo of three"]).repeated(2),  # or read_prompts("prompts.csv")
    judge_digit("three"),  # or ClassifierJudge(network, 497), ClipJudge(…), NudeNetJudge()
    original=pipe,
    retain=PromptSet.of(["one", "zwei", "cinco"], labels=[1, 2, 5]),
    attacks={"random": RandomPrefix(k=2, n_tries=4), "synonyms": Synonyms(table={"three": ["drei", "tres"]})},
    guidance=3.0,
    steps=3,
)
print(f"the concept is seen in {report['before'].value:.0%} of pictures before, {report['pre_asr'].value:.0%} after,")
print(f"and {report['asr'].value:.0%} under attack {report['asr'].interval};")
print(f"of what others draw, {report['retention/lost'].value:.0%} was lost")
print("reasons to distrust this:", *report.document["flags"], sep="\n- ")
print("pictures:", report.save("report") / "report.html")
