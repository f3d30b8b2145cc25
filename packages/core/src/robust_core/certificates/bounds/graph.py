"""From the user's own ``nn.Module`` to a small graph of supported operators.

The module is traced symbolically (``torch.fx``; ``torch.export`` where its Python control flow defeats fx), never
changed, and the graph reads the module's parameters anew at each use, so bounds follow a training step.
A layer or function without a sound rule raises :class:`~robust_core.errors.UnsupportedLayerError`, which says what
it is and where it stands. At the end the graph is evaluated beside the module: a graph that does not reproduce
the module is refused, so that bounds can never speak of another network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from robust_core.certificates.bounds.box import Box, Rounding
from robust_core.certificates.bounds.layers import translate_module
from robust_core.certificates.bounds.operators import Operator, Shape
from robust_core.certificates.bounds.site import Const, Ref, Site
from robust_core.certificates.bounds.translate import function_name, translate_call
from robust_core.errors import CertificationError, UnsupportedLayerError
from robust_core.models import Normalize, frozen, padded

__all__ = ["Graph", "Node", "check_twin", "refuse_hooks", "trace"]

EXAMPLE_BATCH = 3


@dataclass(frozen=True)
class Node:
    """An operator and the positions of its inputs; the input of the network is position 0, with no operator."""

    operator: Operator | None
    inputs: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """A network as operators in an order in which each comes after its inputs; the last one gives the logits."""

    nodes: tuple[Node, ...]

    @property
    def n_classes(self) -> int:
        """Length of the logits."""
        return self.nodes[-1].shape[0]

    @property
    def widest(self) -> int:
        """Number of elements of the largest value."""
        return max(int(torch.Size(node.shape).numel()) for node in self.nodes)

    @property
    def consumers(self) -> list[int]:
        """How many operators read each value."""
        counts = [0] * len(self.nodes)
        for node in self.nodes:
            for source in node.inputs:
                counts[source] += 1
        return counts

    def evaluate(self, x: Tensor) -> Tensor:
        """Return the logits (B, C)."""
        values = [x]
        for node in self.nodes[1:]:
            values.append(operator_of(node).evaluate(*(values[source] for source in node.inputs)))
        return values[-1]

    def intervals(self, box: Box, rounding: Rounding | None) -> list[Box]:
        """Return a box of every value."""
        boxes = [box]
        for node in self.nodes[1:]:
            boxes.append(operator_of(node).interval([boxes[source] for source in node.inputs], rounding))
        return boxes


def operator_of(node: Node) -> Operator:
    """Return the operator of a node that is not the input."""
    if node.operator is None:
        raise CertificationError("the input of a network is not an operator")
    return node.operator


class _Tracer(fx.Tracer):
    """Traces through everything but torch's own layers and :class:`~robust_core.models.Normalize`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs a traced module and keeps every intermediate value (shapes are what we are after)."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, object] = {}
        self.versions: dict[fx.Node, int] = {}
        self.late_reads: list[tuple[fx.Node, fx.Node]] = []

    def run_node(self, n: fx.Node) -> object:
        """Run a step, and note whether it reads what an earlier one overwrote: a graph of values cannot show that."""
        for source in n.all_input_nodes:
            if self.versions[source] != _version(self.values[source]):
                self.late_reads.append((n, source))
        self.values[n] = super().run_node(n)
        self.versions[n] = _version(self.values[n])
        return self.values[n]

    def refuse_overwriting(self) -> None:
        """Refuse in-place operations on values that are read again."""
        for reader, source in self.late_reads:
            raise UnsupportedLayerError(
                f"{reader.name!r} reads {source.name!r} after an in-place operation (inplace=True, x += ..., relu_) "
                "has overwritten it; write that operation out of place"
            )


def _version(value: object) -> int:
    """Return how often the memory of a tensor, shared with its views, has been written to."""
    return value._version if isinstance(value, Tensor) else 0


def trace(model: nn.Module, x: Tensor, *, fixed: bool = False) -> Graph:
    """Return the graph of ``model`` in eval mode.

    Args:
        model: any ``nn.Module`` of supported layers that maps (B, *shape) to logits (B, C); left as found.
        x: (B, *shape) a batch that shows shape, dtype and device.
        fixed: the parameters will never change again, so that what is computed of them alone may be kept.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        UnsupportedLayerError: a layer, function or Python construct has no rule; the message names it.
        CertificationError: the graph does not reproduce the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; bounds need an nn.Module (other callables: robust_core's Smoothing)"
        )
    refuse_hooks(model)
    # Inference mode keeps no count of writes to a tensor, which tells what was overwritten.
    with torch.inference_mode(mode=False), frozen(model), torch.no_grad():
        example = x[:1].detach().expand(EXAMPLE_BATCH, *x.shape[1:]).clone()
        state = [example, *model.parameters(), *model.buffers()]
        versions = [_version(value) for value in state]
        traced = _symbolic(model, example)
        recorder = _Recorder(traced)
        output = recorder.run(example)
        recorder.refuse_overwriting()
        if versions != [_version(value) for value in state]:
            raise UnsupportedLayerError(
                f"{type(model).__name__} overwrites its input, a parameter or a buffer when it is called, so that it "
                "is not one function; write that operation out of place"
            )
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != EXAMPLE_BATCH:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CertificationError(f"the model returned {found}; a classifier maps (B, ...) to logits (B, C)")
        graph = _Builder(traced, recorder.values).build()
        _check_replay(graph, model, example)
    for node in graph.nodes[1:]:
        operator_of(node).fixed = fixed
    return graph


def refuse_hooks(model: nn.Module) -> None:
    """Refuse a model whose layers do more than their classes say."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedLayerError(
                f"layer {name or 'model'!r} ({type(module).__name__}) carries forward hooks, which may change what it "
                "computes unseen; remove them (old-style weight_norm or spectral_norm: use those of "
                "torch.nn.utils.parametrizations)"
            )
        if "forward" in vars(module):
            raise UnsupportedLayerError(
                f"layer {name or 'model'!r} ({type(module).__name__}) had its forward replaced on the object; write a "
                "class of your own, whose forward can be followed"
            )


def _symbolic(model: nn.Module, example: Tensor) -> fx.GraphModule:
    try:
        graph = _Tracer().trace(model)
        return fx.GraphModule(model, graph)
    except Exception as reason:  # noqa: BLE001 - tracing runs the user's code on stand-ins: anything may be raised
        return _exported(model, example, reason)


def _exported(model: nn.Module, example: Tensor, reason: Exception) -> fx.GraphModule:
    try:
        exported = torch.export.export(model, (example,), strict=False).module(check_guards=False)
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(model).__name__} cannot be traced: its Python code depends on the values of tensors or calls "
            f"what cannot be followed ({type(reason).__name__}: {str(reason).strip().splitlines()[0][:200]})"
        ) from error
    own = {id(parameter) for parameter in model.parameters()}
    if not isinstance(exported, fx.GraphModule) or any(id(p) not in own for p in exported.parameters()):
        raise UnsupportedLayerError(f"{type(model).__name__} cannot be traced with its own parameters") from reason
    return exported


class _Builder:
    """Walks a traced module once and translates call after call."""

    def __init__(self, traced: fx.GraphModule, values: dict[fx.Node, object]) -> None:
        self.traced, self.values = traced, values
        self.modules = dict(traced.named_modules())
        self.nodes: list[Node] = []
        self.known: dict[fx.Node, object] = {}  # Ref to a node, Const, or a plain Python value

    def build(self) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "output":
                result = self.resolve(node.args[0])
                result = result[0] if isinstance(result, tuple | list) else result
                return self.finish(result)
            self.known[node] = self.visit(node)
        raise CertificationError("the traced model has no output")

    def finish(self, result: object) -> Graph:
        if not isinstance(result, Ref):
            raise CertificationError("the model's output does not depend on its input")
        if result.position != len(self.nodes) - 1:
            # What follows the logits does not reach them.
            self.nodes = self.nodes[: result.position + 1]
        return Graph(_prune(self.nodes))

    def resolve(self, value: object) -> object:
        return fx.map_arg(value, lambda node: self.known[node])  # pyright: ignore[reportArgumentType]

    def visit(self, node: fx.Node) -> object:
        value = self.values[node]
        if node.op == "placeholder":
            return self.placeholder(node, value)
        if not any(isinstance(self.known[source], Ref) for source in node.all_input_nodes):
            return self.constant(node, value)
        if not isinstance(value, Tensor) and not self.makes_tensors(value):
            return value  # sizes and arithmetic on them: shapes are fixed
        site = Site(self.label(node), value)
        args, kwargs = self.resolve(node.args), self.resolve(node.kwargs)
        if node.op == "call_module":
            made = translate_module(site, self.modules[str(node.target)], args, kwargs)
        else:
            made = translate_call(site, function_name(node), args, kwargs)
        return made if isinstance(made, Ref) else self.append(site, *made)

    @staticmethod
    def makes_tensors(value: object) -> bool:
        return isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value)

    def placeholder(self, node: fx.Node, value: object) -> object:
        if self.nodes:
            return value  # an optional argument of forward, at its default
        if not isinstance(value, Tensor):
            raise CertificationError("the model's first argument is not a tensor")
        self.nodes.append(Node(None, (), tuple(value.shape[1:])))
        return Ref(0, tuple(value.shape[1:]))

    def constant(self, node: fx.Node, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if node.op == "get_attr":
            return Const(lambda: _attribute(self.traced, str(node.target)), value)
        fixed = value.detach().clone()
        if any(isinstance(self.known.get(source), Const) for source in node.all_input_nodes) and any(
            parameter.requires_grad for parameter in self.traced.parameters()
        ):
            raise UnsupportedLayerError(
                f"{self.label(node)} computes with parameters alone; keep what it computes in a buffer"
            )
        return Const(lambda: fixed, fixed)

    def append(self, site: Site, operator: Operator, sources: Sequence[Ref]) -> Ref:
        if not isinstance(site.value, Tensor) or len(site.value) != EXAMPLE_BATCH:
            raise UnsupportedLayerError(f"{site.label} mixes the samples of a batch or returns no tensor")
        self.nodes.append(Node(operator, tuple(source.position for source in sources), operator.shape))
        return Ref(len(self.nodes) - 1, operator.shape)

    def label(self, node: fx.Node) -> str:
        if node.op == "call_module":
            kind = type(self.modules[str(node.target)]).__name__
            return f"layer {str(node.target)!r} ({kind})"
        stack = node.meta.get("nn_module_stack") or {}
        path = str(next(reversed(stack.values()))[0]) if stack else ""
        path = path.removeprefix("L['self'].")
        place = f"in {path!r}" if path else "in the forward pass"
        return f"{function_name(node)}() {place} (node {node.name!r})"


def _prune(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Drop what does not reach the logits."""
    used = {len(nodes) - 1, 0}
    for position in range(len(nodes) - 1, 0, -1):
        if position in used:
            used.update(nodes[position].inputs)
    order = {old: new for new, old in enumerate(sorted(used))}
    return tuple(
        Node(nodes[old].operator, tuple(order[source] for source in nodes[old].inputs), nodes[old].shape)
        for old in order
    )


def _attribute(root: nn.Module, path: str) -> Tensor:
    value: object = root
    for part in path.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise CertificationError(f"{path} is no longer a tensor")
    return value


def check_twin(graph: Graph, model: nn.Module, x: Tensor, rounding: Rounding) -> None:
    """Compare the graph of a model's float64 copy with the model itself, in the dtype and at the batch size in use.

    The logits may leave the enclosure of their rounding by a thousandth: kernels that are not covered are not refused.

    Raises:
        CertificationError: they differ: the model depends on the dtype or on the size of the batch.
    """
    rows = padded(x[:16])
    with frozen(model), torch.no_grad():
        logits, point = model(rows.clone()).double(), rows.double()
        box = graph.intervals(Box.ends(point, point, outward=True), rounding)[-1]
    room = 1e-3 * torch.nan_to_num(logits.abs()).amax(1, keepdim=True) + 1e-30
    far = torch.isfinite(logits) & ((logits < box.lower - room) | (logits > box.upper + room))
    if bool(far.any()):
        raise CertificationError(
            "the model and its float64 copy differ by more than rounding on the same input: its forward pass looks at "
            "the dtype or at the size of the batch, and a certificate would speak of another function"
        )


def _check_replay(graph: Graph, model: nn.Module, example: Tensor) -> None:
    """Compare graph and model on the example and on a point between it and its mirror image, at another batch size."""
    moved = example * torch.linspace(0.25, 1.0, example[0].numel(), dtype=example.dtype, device=example.device).reshape(
        example.shape[1:]
    )
    points = torch.cat([example[:1], moved[:1]])
    expected, found = model(points.clone()), graph.evaluate(points.clone())
    _compare(found, expected, 1e-9 if example.dtype == torch.float64 else 1e-3)


def _compare(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = torch.nan_to_num(expected.abs()).max()
    if not torch.allclose(found, expected, rtol=tolerance, atol=float(tolerance * scale) + 1e-30, equal_nan=True):
        gap = float((found - expected).abs().max())
        raise CertificationError(
            f"the traced graph and the model differ by {gap:g} on the same input. Randomness in eval mode causes this, "
            "in-place operations on a value that is used again, or a forward pass that looks at the dtype or at the "
            "size of the batch"
        )
