"""Inductor's pass that fuses a decode step: norms, gates and residuals into products, rotary embedding and cache writes into attention.

It looks for what transformers' models compile to, and takes each piece only where nothing else uses what it would swallow. Products are
known by ``fused_product.FUSED``. What it does not recognise (a layer norm, Gemma's norms with an offset, another activation) stays as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optkit_plugins.kernels.attention import decode_step as decode_step_attention
from optkit_plugins.kernels.fused import matvec
from optkit_plugins.kernels.fused.product import FUSED

aten, prims = torch.ops.aten, torch.ops.prims
#: Ops that change a tensor's shape only, where they keep its number of elements.
SHAPES = (aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor)


class StepPass(CustomGraphPass):
    """:ivar found: how many products of one row, norms, gates, residuals and attentions, over all graphs compiled so far."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.products = matvec.MatvecPass()

    def __call__(self, graph: Graph) -> None:
        self.products(graph)
        self.found["products"] = self.products.replaced
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in FUSED and FUSED[node.target].takes(node):
                self.found.update(fuse_product(graph, node))
            elif node.target in (aten.bmm.default, aten.mm.default) and statically_known_true(value(node.args[0]).shape[-1] == 1):
                node.target = aten.mul.Tensor  # one summand: the angles of a position are made so, by a product of the library
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is torch.ops.optkit.decode_attention.default:
                self.found["attentions"] += fuse_attention(graph, node)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        files = get_hash_for_files((__file__, matvec.__file__, decode_step_attention.__file__))
        return files, tuple(sorted(str(op) for op in FUSED))


def with_products(arguments: dict[str, Any], products: str) -> dict[str, Any]:
    """Arguments of ``torch.compile`` under which ``products`` multiplies single rows: ``library``, ``matvec``, ``fused`` (with what stands
    round the products, and attention that writes the cache), or ``inductor``, which writes and tunes a reduction for each."""
    from torch._inductor import list_mode_options

    if arguments.get("backend") != "inductor" or products == "library":
        return arguments
    passes = {"matvec": matvec.MatvecPass, "fused": StepPass}
    chosen = {"post_grad_custom_pre_pass": passes[products]()} if products in passes else {"coordinate_descent_tuning": True}
    mode = arguments.get("mode")
    rest = {name: value for name, value in arguments.items() if name != "mode"}
    return {**rest, "options": {**(list_mode_options(mode) if mode else {}), **chosen}}


# ---------------------------------------------------------------- products


def fuse_product(graph: Graph, node: Node) -> list[str]:
    """Put what stands round a product into it. :return: the kinds of what was."""
    given: Any = node.args[0]
    norm, last, gated, residual = rms_norm(given), behind(node), False, None
    half = gate_and_up(last)
    if half is not None:
        last, gated = behind(half), True
    end: Any = half if gated else node
    added = sole_user(last, aten.add.Tensor)
    if added is not None and not added.kwargs:
        other = added.args[1] if added.args[0] is last else added.args[0]
        if isinstance(other, Node) and other is not last and same_form(value(other), value(last)):
            residual, end = other, added
    found = [name for name, there in (("norms", norm), ("gates", gated), ("residuals", residual)) if there]
    if not found:
        return []
    shape = list(value(node).shape)
    if gated:
        shape[-1] //= 2
    place = end if found != ["norms"] else node
    with graph.inserting_before(place):
        x, weight, eps = norm or (given, None, 0.0)
        if norm:
            x = reshaped(graph, x, value(given).shape)
        if residual is not None:
            residual = reshaped(graph, residual, shape)
        new = graph.call_function(FUSED[node.target].op, (x, *node.args[1:], weight, eps, residual, gated), dict(node.kwargs))
        new.meta["val"] = value(node).new_empty(shape)
        out = reshaped(graph, new, value(place).shape)
    place.replace_all_uses_with(out)
    return found


def behind(node: Node) -> Node:
    """The node, or what its only users make of it by changing its shape."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in SHAPES or not same_number(user, node):
            break
        node = user
    return node


def before(node: Any) -> Any:
    """The node whose elements this one has, in another shape."""
    while isinstance(node, Node) and node.target in SHAPES and same_number(node, node.args[0]):
        node = node.args[0]
    return node


def rms_norm(node: Any) -> tuple[Node, Node, float] | None:
    """Input, weight and eps of the RMS norm that this is: ``weight * (x.float() * rsqrt(mean(x.float()²) + eps)).to(x.dtype)``."""
    for weight, narrow in operands(before(node), aten.mul.Tensor):
        if not is_call(narrow, prims.convert_element_type.default) or not isinstance(weight, Node) or value(weight).dim() != 1:
            continue
        for wide, root in operands(narrow.args[0], aten.mul.Tensor):
            if not is_call(root, aten.rsqrt.default) or not is_call(wide, prims.convert_element_type.default):
                continue
            x = wide.args[0]
            for mean, eps in operands(root.args[0], aten.add.Tensor):
                if (
                    is_call(mean, aten.mean.dim)
                    and isinstance(eps, float)
                    and is_call(mean.args[0], aten.pow.Tensor_Scalar)
                    and mean.args[0].args == (wide, 2)
                    and list(mean.args[1]) in ([-1], [value(wide).dim() - 1])
                    and value(wide).dtype == torch.float32
                    and value(narrow).dtype == value(x).dtype == value(weight).dtype
                ):
                    return x, weight, eps
    return None


def gate_and_up(node: Node) -> Node | None:
    """The node that is ``silu(gate) * up`` of a product's two halves."""
    split = sole_user(node, aten.split_with_sizes.default)
    if split is None or len(split.args[1]) != 2 or split.args[1][0] != split.args[1][1]:
        return None
    dimension = split.args[2] if len(split.args) > 2 else 0
    if dimension % value(node).dim() != value(node).dim() - 1:
        return None
    halves = {user.args[1]: user for user in split.users if user.target is operator.getitem}
    if len(halves) != len(split.users) or set(halves) != {0, 1} or len(halves[0].users) != 1:
        return None
    product = sole_user(halves[1], aten.mul.Tensor)
    for acted, up in operands(product, aten.mul.Tensor):
        if up is halves[1] and is_call(acted, prims.convert_element_type.default) and is_silu(acted.args[0], halves[0]):
            return product if len(acted.users) == 1 else None
    return None


def is_silu(node: Any, of: Node) -> bool:
    """Whether this is ``silu(of.float())``."""
    if is_call(node, aten.div.Tensor):  # x / (1 + exp(-x))
        wide, below = node.args
        grown = [grown for grown, one in operands(below, aten.add.Tensor) if one == 1]
        right = bool(grown) and is_call(grown[0], aten.exp.default) and is_call(grown[0].args[0], aten.neg.default)
        right = right and grown[0].args[0].args[0] is wide
    else:
        pairs = [wide for wide, bent in operands(node, aten.mul.Tensor) if is_call(bent, aten.sigmoid.default) and bent.args[0] is wide]
        wide, right = (pairs or [None])[0], bool(pairs)
    return right and is_call(wide, prims.convert_element_type.default) and wide.args[0] is of and value(wide).dtype == torch.float32


# ---------------------------------------------------------------- attention


def fuse_attention(graph: Graph, node: Node) -> int:
    """Let the attention write the cache itself, and turn query and key where that is what they come from. :return: 1 if so, else 0."""
    arguments: list[Any] = list(node.args)
    query, keys, values, *rest = arguments
    key, fresh = written_column(keys, node), written_column(values, node)
    if key is None or fresh is None or key["column"] is not fresh["column"]:
        return 0
    if not same_shape(value(query).shape[:1], value(keys).shape[:1]):
        return 0
    named = {"query": query, "key": key["new"], "value": fresh["new"], "cos": None, "sin": None}
    turned_query, turned_key = rotary(query), rotary(key["new"])
    if turned_query and turned_key and turned_query[1:] == turned_key[1:]:
        named |= {"query": turned_query[0], "key": turned_key[0], "cos": turned_query[1], "sin": turned_query[2]}
    named |= {"keys": key["cache"], "values": fresh["cache"], "column": key["column"]}
    named |= dict(zip(("first", "last", "counters", "scale", "window", "softcap"), rest, strict=True))
    with graph.inserting_before(node):
        whole = graph.call_function(torch.ops.higher_order.auto_functionalized, (torch.ops.optkit.decode_step_attention.default,), named)
        whole.meta["val"] = (value(node), value(keys), value(values))
        parts = [graph.call_function(operator.getitem, (whole, index)) for index in range(3)]
    for part, old in zip(parts, (node, keys, values), strict=True):
        part.meta["val"] = value(old)
        old.replace_all_uses_with(part)
    return 1


def written_column(cache: Any, reader: Node) -> dict[str, Node] | None:
    """``cache``, ``column`` (1,) and ``new`` vectors (rows, heads, 1, size), if this is a cache with them, that only ``reader`` reads."""
    if not is_call(cache, aten.index_put.default) or len(cache.args) > 3 or cache.kwargs:
        return None
    whole, places, new = cache.args
    if len(places) != 3 or places[0] is not None or places[1] is not None or not same_shape(value(places[2]).shape, (1,)):
        return None
    rows, heads, _, size = value(whole).shape
    keeps = [user for user in cache.users if is_call(user, aten.copy_.default) and user.args[0] is whole]
    if whole.op != "placeholder" or len(keeps) != 1 or {*cache.users} != {reader, *keeps}:
        return None
    return {"cache": whole, "column": places[2], "new": new} if same_shape(value(new).shape, (rows, heads, 1, size)) else None


def rotary(node: Any) -> tuple[Node, Node, Node] | None:
    """``x``, ``cos`` and ``sin``, where this is ``x * cos + cat(-upper half of x, lower half) * sin``."""
    for straight, crossed in operands(node, aten.add.Tensor):
        for both, sin in operands(crossed, aten.mul.Tensor):
            if not is_call(both, aten.cat.default) or len(both.args[0]) != 2:
                continue
            upper, lower = both.args[0]
            if not is_call(upper, aten.neg.default):
                continue
            x, half = lower.args[0], value(lower).shape[-1]
            ends = [(upper.args[0], half, 2 * half), (lower, 0, half)]
            for other, cos in operands(straight, aten.mul.Tensor):
                if (
                    other is x
                    and all(is_slice(part, x, begin, end) for part, begin, end in ends)
                    and same_shape(value(x).shape[-1:], (2 * half,))
                    and all(is_angle(angle, x) for angle in (cos, sin))
                    and value(node).dtype == value(x).dtype
                ):
                    return x, before(cos), before(sin)  # made once for all layers, which a view of them would not be
    return None


def is_slice(node: Any, x: Node, begin: int, end: int) -> bool:
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x or len(node.args) != 4:
        return False
    last = value(x).dim() - 1
    return node.args[1] % (last + 1) == last and node.args[2] == begin and min(node.args[3], value(x).shape[last]) == end


def is_angle(node: Any, x: Node) -> bool:
    rows, _, _, size = value(x).shape
    return isinstance(node, Node) and any(same_shape(value(node).shape, (number, 1, 1, size)) for number in (1, rows))


# ---------------------------------------------------------------- graphs


def value(node: Any) -> Any:
    return node.meta["val"]


def is_call(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def operands(node: Any, target: Any) -> Iterator[tuple[Any, Any]]:
    """Both orders of the two operands, if the node is a call of ``target``."""
    if is_call(node, target) and len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def sole_user(node: Node, target: Any) -> Any:
    """The node's only user, if that is a call of ``target``."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], target) else None


def same_shape(one: Any, two: Any) -> bool:
    """Whether they are equal whatever sizes that are left open turn out to be."""
    return len(one) == len(two) and all(statically_known_true(a == b) for a, b in zip(one, two, strict=True))


def same_number(one: Any, two: Any) -> bool:
    return bool(statically_known_true(value(one).numel() == value(two).numel()))


def same_form(one: Any, two: Any) -> bool:
    return same_shape(one.shape, two.shape) and one.dtype == two.dtype


def reshaped(graph: Graph, node: Node, shape: Any) -> Node:
    if same_shape(value(node).shape, shape):
        return node
    new = graph.call_function(aten.reshape.default, (node, list(shape)))
    new.meta["val"] = value(node).reshape(tuple(shape))
    return new
