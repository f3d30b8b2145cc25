"""The words of ``--judge``, for all verbs: read without torch, then made into a judge.

================================================  ======================================================================
``digits:three``                                  the digits of :mod:`diffusion_unlearn.digits`
``classifier:package.module:factory,class=497``   your network, or a ``.pt2`` file; also ``top_k``, ``threshold``,
                                                  ``size``, ``weights``, ``name``, ``version``; ``class=3+5`` for two
``clip:FOLDER,concept=a church,against=a photo``  CLIP; several texts are separated by ``|``; also ``threshold``
``nudenet``                                       NudeNet, if installed; also ``threshold``, ``classes=private``
``judge:package.module:name``                     your own judge, or a function that makes one
================================================  ======================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_core.errors import ResourceError
from robust_core.words import check_module, check_word, parse_spec

if TYPE_CHECKING:
    import torch

    from diffusion_unlearn.judges import ClassifierJudge, Judge

__all__ = ["HELP", "KINDS", "JudgeWords", "check_judge", "judge_of"]

HELP = "digits:three, classifier:package.module:factory,class=K, clip:FOLDER,concept=…,against=…, nudenet or judge:…"
KINDS = {
    "digits": ("threshold",),
    "classifier": ("class", "top_k", "threshold", "size", "weights", "name", "version"),
    "clip": ("concept", "against", "threshold"),
    "nudenet": ("threshold", "classes"),
    "judge": (),
}
"""Kind -> its options."""
NEEDED = {"classifier": ("class",), "clip": ("concept", "against")}
COUNTS = ("top_k", "size")


@dataclass(frozen=True)
class JudgeWords:
    """``--judge``, read.

    Attributes:
        kind: one of :data:`KINDS`.
        name: what stands behind the colon.
        options: by name, as numbers where they are such.
    """

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


def check_judge(words: str, *, option: str = "--judge") -> JudgeWords:
    """Return what the words say, without importing torch.

    Raises:
        ValueError: words of no known form, or an option that is unknown, missing or no number.
        ResourceError: a module, file or folder that is not there.
    """
    head, *rest = words.split(",")
    kind, _, name = head.partition(":")
    if kind not in KINDS:
        raise ValueError(f"{option} {words!r}: give {HELP}")
    if bool(name) == (kind == "nudenet"):
        raise ValueError(f"{option} {words!r}: {HELP}")
    options: dict[str, Any] = {}
    for part in rest:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"{option} {words!r}: {part.strip()!r} is no name=value")
        check_word(f"{option} {kind}", key, KINDS[kind])
        if key in options:
            raise ValueError(f"{option} {words!r}: {key} stands twice")
        options[key] = _value(option, key, value)
    missing = [key for key in NEEDED.get(kind, ()) if key not in options]
    if missing:
        raise ValueError(f"{option} {words!r}: {missing[0]}=… is needed")
    _check_place(option, words, kind, name, options)
    return JudgeWords(kind, name, options)


def _value(option: str, key: str, value: str) -> Any:
    try:
        if key in COUNTS:
            return int(value)
        if key == "threshold":
            return float(value)
        if key == "class":
            return tuple(int(number) for number in value.split("+"))
    except ValueError:
        raise ValueError(f"{option} {key}={value!r}: a number is needed") from None
    if key in ("concept", "against"):
        return tuple(text.strip() for text in value.split("|"))
    return value


def _check_place(option: str, words: str, kind: str, name: str, options: dict[str, Any]) -> None:
    if kind == "clip" and not Path(name).expanduser().is_dir():
        raise ResourceError(f"{option} {words}: no such folder {name}")
    if kind == "classifier" and parse_spec(name)[0] == "pt2" and not Path(name).expanduser().is_file():
        raise ResourceError(f"{option} {words}: no such file {name}")
    if kind in ("classifier", "judge") and not name.endswith(".pt2"):
        parse_spec(name)
        check_module(name)
    if "weights" in options and not Path(options["weights"]).expanduser().is_file():
        raise ResourceError(f"{option} {words}: no such file {options['weights']}")
    if kind == "nudenet" and "classes" in options:
        check_word(f"{option} classes", options["classes"], ("exposed", "private"))


def judge_of(words: str | JudgeWords, *, device: torch.device | str = "cpu") -> Judge:
    """Return the judge.

    Args:
        words: as :func:`check_judge` reads them.
        device: where networks of the judge go.
    """
    read = check_judge(words) if isinstance(words, str) else words
    if read.kind == "digits":
        from diffusion_unlearn.judges import judge_digit

        return judge_digit(int(read.name) if read.name.isdigit() else read.name, **read.options)
    if read.kind == "classifier":
        return _classifier(read, device)
    if read.kind == "clip":
        from diffusion_unlearn.clip import ClipFeatures, ClipJudge

        return ClipJudge(ClipFeatures.from_folder(Path(read.name).expanduser(), device=device), **read.options)
    if read.kind == "nudenet":
        from diffusion_unlearn.nudity import EXPOSED, PRIVATE, NudeNetJudge

        more = {key: value for key, value in read.options.items() if key != "classes"}
        return NudeNetJudge(classes=PRIVATE if read.options.get("classes") == "private" else EXPOSED, **more)
    return _own(read)


def _classifier(read: JudgeWords, device: torch.device | str) -> ClassifierJudge:
    from diffusion_unlearn.judges import ClassifierJudge
    from robust_core.loading import load_model

    more = {key: value for key, value in read.options.items() if key not in ("class", "weights")}
    more.setdefault("name", read.name)
    weights = read.options.get("weights")
    network = load_model(read.name, weights=None if weights is None else Path(weights).expanduser(), device=device)
    return ClassifierJudge(network, read.options["class"], **more)


def _own(read: JudgeWords) -> Judge:
    from diffusion_unlearn.judges import Judge
    from robust_core.loading import load_object

    found = load_object(read.name)
    if isinstance(found, type) or not isinstance(found, Judge):
        if not callable(found):
            raise ValueError(f"--judge judge:{read.name}: a judge, or a function that makes one, is needed")
        try:
            found = found()
        except Exception as error:  # the user's code: anything may be raised
            raise ValueError(
                f"--judge judge:{read.name} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(found, Judge):
        raise ValueError(
            f"--judge judge:{read.name} gave {type(found).__name__}; a judge has name, version, threshold and rule, "
            "and is called with images and prompts"
        )
    return found
