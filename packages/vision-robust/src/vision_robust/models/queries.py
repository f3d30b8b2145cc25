"""Queries for black boxes: ONNX files, services over HTTP, functions of arrays; and the words that name them.

=============================  ===============================================================================
``onnx:FILE``                  onnxruntime (extra ``onnx``); ``#layout=nhwc`` where channels come last
``http://…``, ``https://…``    POST of a ``.npy`` body (B, C, H, W) float32; answered by ``.npy`` or JSON
``callable:pkg.module:name``   a function of numpy arrays, importable from the current folder too
=============================  ===============================================================================

Options follow a ``#``, with commas: ``onnx:net.onnx#scores=labels,n_classes=10,max_queries=50000,batch_size=64``.
Nothing here loads pickled data.
"""

from __future__ import annotations

import io
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from robust_core.attacks.zeroth_order import ArrayModel
from robust_core.checks import check_choice, check_count, check_number
from robust_core.errors import ResourceError, UntrustedFileError, optional_import
from robust_core.io.files import parse_json, sha256
from robust_core.loading import load_object
from vision_robust.models.black_box import BlackBox

__all__ = ["BLACK_BOXES", "HttpQuery", "OnnxQuery", "QueryError", "black_box"]

BLACK_BOXES = ("onnx", "http", "https", "callable")
LAYOUTS = ("auto", "nchw", "nhwc")
_CHANNELS = (1, 3, 4)
_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_MOST_BYTES = 1 << 28
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class QueryError(ResourceError):
    """A black box did not answer, or its answer cannot be read."""


class _Shared:
    """Copies of a module share what answers its queries."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class OnnxQuery(_Shared):
    """The scores of an ONNX file, by onnxruntime on the CPU.

    Args:
        path: the file; one input, a batch of images. A fixed batch size is met by padding.
        layout: order of the axes that the file wants; inputs are always (B, C, H, W). ``"auto"`` reads it from the
            shape of the input, and takes nchw where that tells nothing.
        output: name of the output that holds the scores; by default the first of two axes, else the first.

    Raises:
        QueryError: no such file, or one that onnxruntime cannot load.
        ValueError: several inputs, an input of integers, no such output.
    """

    def __init__(self, path: str | Path, *, layout: str = "auto", output: str | None = None) -> None:
        runtime = optional_import("onnxruntime", extra="onnx", package="vision-robust")
        check_choice("layout", layout, LAYOUTS)
        file = Path(path)
        if not file.is_file():
            raise QueryError(f"{path}: no such file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        try:
            self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise QueryError(f"{path} is no ONNX file that onnxruntime can run: {_one_line(error)}") from error
        self.identity = f"onnx:{sha256(file)}"
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(entry.name for entry in inputs)
            raise ValueError(f"{path} has the inputs {names}; one input, a batch of images, is needed")
        self.name, self.shape = inputs[0].name, list(inputs[0].shape)
        if inputs[0].type not in _FLOATS:
            raise ValueError(
                f"{path}: input {self.name!r} is {inputs[0].type}; images in [0, 1] are floating point: put the "
                "scaling into the model"
            )
        self.dtype = _FLOATS[inputs[0].type]
        self.layout = _layout(self.shape) if layout == "auto" else layout
        self.output = self._output(output, path)

    def _output(self, wanted: str | None, path: str | Path) -> str:
        outputs = {o.name: o for o in self.session.get_outputs()}
        if wanted is not None and wanted not in outputs:
            raise ValueError(f"output={wanted!r}: {path} has {', '.join(outputs)}")
        scores = [name for name, o in outputs.items() if o.type in _FLOATS and len(o.shape or ()) == 2]
        return wanted or (scores or list(outputs))[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Return (B, C) scores of (B, C, H, W) images."""
        array = x.detach().cpu().numpy().astype(self.dtype)
        if self.layout == "nhwc" and array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        fixed = self.shape[0] if self.shape and isinstance(self.shape[0], int) and self.shape[0] > 0 else None
        self._check(array)
        if fixed is None:
            return self._run(array, x)
        missing = -len(array) % fixed
        whole = np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing else array
        rows = [self._run(whole[start : start + fixed], x) for start in range(0, len(whole), fixed)]
        return torch.cat(rows)[: len(x)]

    def _check(self, array: np.ndarray) -> None:
        wanted = self.shape[1:]
        fits = len(wanted) == array.ndim - 1 and all(
            not isinstance(w, int) or w <= 0 or w == have for w, have in zip(wanted, array.shape[1:], strict=True)
        )
        if self.shape and not fits:
            raise ValueError(
                f"the ONNX file wants (B, {', '.join(map(str, wanted))}); it was given {array.shape} in layout "
                f"{self.layout!r}. Another order of axes is said by layout='nchw' or 'nhwc', another size by the data"
            )

    def _run(self, array: np.ndarray, x: Tensor) -> Tensor:
        try:
            (scores,) = self.session.run([self.output], {self.name: array})
        except Exception as error:
            raise QueryError(f"onnxruntime failed on {array.shape}: {_one_line(error)}") from error
        return torch.from_numpy(np.array(scores)).to(x.device)


def _layout(shape: list[Any]) -> str:
    last_only = len(shape) == 4 and shape[3] in _CHANNELS and shape[1] not in _CHANNELS
    return "nhwc" if last_only else "nchw"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """A redirected POST would arrive as a GET without the images."""


class HttpQuery(_Shared):
    """The scores of a service: images go out as the bytes of a ``.npy`` file, scores come back as ``.npy`` or JSON.

    JSON is a list of rows, or an object with the list under ``"scores"``.

    Args:
        url: ``http://`` or ``https://``.
        timeout: seconds to wait for an answer.
        retries: further attempts after no answer, or an answer that says "later" (408, 425, 429, 5xx).
        wait: seconds before the first of them, doubled each time.
        headers: further headers, such as an authorisation; they are neither logged nor part of the identity.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        wait: float = 0.5,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: an address that begins with http:// or https:// is needed")
        self.url, self.identity = url, url
        self.timeout = check_number("timeout", timeout, low=0, open_low=True)
        self.retries, self.wait = check_count("retries", retries, low=0), check_number("wait", wait, low=0)
        self.headers = {
            **(headers or {}),
            "Content-Type": "application/x-npy",
            "Accept": "application/x-npy, application/json",
        }
        self._opener = urllib.request.build_opener(_NoRedirect())

    def __call__(self, x: Tensor) -> Tensor:
        """Return the service's scores (B, C).

        Raises:
            QueryError: no answer after all attempts, or one that cannot be read.
        """
        body = io.BytesIO()
        np.save(body, x.detach().cpu().float().numpy(), allow_pickle=False)
        scores = _scores(self._post(body.getvalue()), self.url)
        return torch.from_numpy(scores).to(x.device)

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, self.headers, method="POST")
        for attempt in range(self.retries + 1):
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    found = answer.read(_MOST_BYTES + 1)
                if len(found) > _MOST_BYTES:
                    raise QueryError(f"{self.url} answered more than {_MOST_BYTES} bytes")
                return found
            except urllib.error.HTTPError as error:
                problem, hopeless = f"status {error.code}: {_one_line(error.read(300))}", error.code not in _AGAIN
                error.close()
            except (OSError, HTTPException) as error:  # URLError, time-outs, connections that break
                problem, hopeless = _one_line(getattr(error, "reason", error)), False
            if hopeless or attempt == self.retries:
                raise QueryError(f"{self.url} did not answer ({attempt + 1} attempts): {problem}")
            time.sleep(self.wait * 2**attempt)
        raise QueryError(f"{self.url} was not asked")


def _scores(body: bytes, url: str) -> np.ndarray:
    if body.startswith(b"\x93NUMPY"):
        try:
            return np.ascontiguousarray(np.load(io.BytesIO(body), allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            raise QueryError(f"{url} answered a .npy body that cannot be read: {_one_line(error)}") from error
    try:
        document = parse_json(body, source=url)
        scores = np.asarray(document["scores"] if isinstance(document, dict) else document)
    except (ValueError, KeyError, UntrustedFileError) as error:
        raise QueryError(
            f"{url} answered {_one_line(body[:80])!r}; a .npy body, JSON rows or {{'scores': rows}} is needed"
        ) from error
    if scores.dtype.kind not in "iuf":
        raise QueryError(f"{url} answered rows of {scores.dtype}; as many numbers for each image are needed")
    return scores.astype(np.float32) if scores.dtype.kind == "f" or scores.ndim == 2 else scores.astype(np.int64)


def _one_line(error: object) -> str:
    text = error.decode("utf-8", "replace") if isinstance(error, bytes) else str(error)
    return " ".join(text.split())[:300]


def black_box(words: str, **options: Any) -> BlackBox:
    """Return the black box that ``words`` name; see the table of this module.

    Args:
        words: ``onnx:FILE``, an ``http(s)`` address or ``callable:package.module:name``, with options behind ``#``.
        options: of :class:`BlackBox`, over those in the words.

    Raises:
        ValueError: words of no known form.
        ResourceError: a file, a module or a service that is not there.
    """
    target, _, behind = words.partition("#")
    chosen: dict[str, Any] = {**_options(behind, words), **options}
    layout = chosen.pop("layout", "auto")
    kind, _, name = target.partition(":")
    if kind == "onnx":
        query: Any = OnnxQuery(name, layout=layout)
    elif layout != "auto":
        raise ValueError(f"{words!r}: layout is an option of ONNX files")
    elif kind in ("http", "https"):
        query = HttpQuery(target)
    elif kind == "callable":
        query = ArrayModel(load_object(name))
        chosen.setdefault("identity", target)
    else:
        raise ValueError(f"{words!r}: onnx:FILE, http(s)://… or callable:package.module:name is needed")
    return BlackBox(query, **chosen)


def _options(text: str, words: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name in ("scores", "layout"):
            found[name] = value
        elif name in ("n_classes", "max_queries", "batch_size") and value.isdecimal():
            found[name] = int(value)
        else:
            raise ValueError(
                f"{words!r}: {part!r} is no option; scores=…, layout=…, n_classes=N, max_queries=N, batch_size=N are"
            )
    return found
