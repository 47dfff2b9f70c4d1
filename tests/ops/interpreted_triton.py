"""Run by `test_triton_interpret.py` with TRITON_INTERPRET=1: kernels against float64 on the CPU."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from attention_checks import far_apart
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from diffmm.ops import AttentionMask, diff_attention, softmax_attention
from diffmm.ops.diff_attention.reference import reference
from diffmm.ops.diff_attention.triton.masking import KernelMask

BATCH = 2


@pytest.fixture(autouse=True)
def _numpy_scalars(monkeypatch):
    """Triton 3.6 converts one-element arrays to integers in a way that numpy 2.4 rejects."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch):
    """Triton replaces its language by an interpreted one at every launch, and looks for what is
    left to replace at every call of a function, which takes a quarter of the time."""
    patch = interpreter._patch_lang
    modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: patch(modules))

    def call(function, *arguments, **named):
        return function.rewrite()(*arguments, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def _types_made_once(monkeypatch):
    """Triton makes a type with a new name for every intermediate result, another for its shape, and
    a table of all numpy types at every look into it, which takes half of the time."""
    made, make = {}, tl.block_type.__init__

    def make_once(self, element_ty, shape):
        key = str(element_ty), *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make(self, element_ty, shape)
            made[key] = vars(self)
        vars(self).update(made[key])

    numpy_types, numpy_type = {}, interpreter._get_np_dtype

    def numpy_type_once(triton_type):
        name = str(triton_type.scalar)
        if name not in numpy_types:
            numpy_types[name] = numpy_type(triton_type)
        return numpy_types[name]

    monkeypatch.setattr(tl.block_type, "__init__", make_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type_once)
    # Nothing looks at the type of a tuple without names of fields.
    type_of = tl.core._type_for_tuple_values
    monkeypatch.setattr(
        tl.core,
        "_type_for_tuple_values",
        lambda values, fields=None: type_of(values, fields) if fields else None,
    )


@pytest.fixture
def wrapping(monkeypatch):
    """Do not look for overflow of integers, which takes a fifth of the time: it wraps, as on a GPU,
    and results are compared."""
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill every uninitialized allocation with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def masks(num_keys):
    """Every field and combinations, including rows and tiles without visible keys."""
    keys = torch.arange(num_keys)
    prefix = torch.tensor([3, num_keys - 5])
    packed = torch.stack([keys // 20, keys // 33])
    shuffled = torch.randint(0, 3, (BATCH, num_keys))
    padding = torch.stack([keys < num_keys - 25, keys >= 18])
    holes = torch.rand(BATCH, num_keys) > 0.3
    nothing = torch.zeros(BATCH, num_keys, dtype=torch.bool)
    nothing[1, 2] = True
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=9),
        "window of one": AttentionMask(window=1),
        "causal window": AttentionMask(causal=True, window=21),
        "prefix": AttentionMask(causal=True, prefix_lengths=prefix),
        "prefix window": AttentionMask(causal=True, prefix_lengths=prefix, window=12),
        "documents": AttentionMask(document_ids=packed),
        "causal documents": AttentionMask(causal=True, document_ids=packed),
        "shuffled documents": AttentionMask(document_ids=shuffled),
        "padding": AttentionMask(key_padding=padding),
        "causal holes": AttentionMask(causal=True, key_padding=holes),
        "documents and padding": AttentionMask(document_ids=packed, key_padding=padding),
        "everything": AttentionMask(True, 30, prefix, packed, padding),
        "nothing": AttentionMask(key_padding=nothing),
    }


def make_inputs(N, M, H, G, C, D, E, dtype=torch.float32, lam_shape=None):
    lam_shape = (BATCH, N, H) if lam_shape is None else lam_shape
    shapes = (BATCH, N, H, 2, D), (BATCH, M, G, C, D), (BATCH, M, G, E)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*inputs, torch.randn(lam_shape))]


def run(op, inputs):
    out = op(*inputs)
    grad = torch.linspace(-1, 1, out.numel()).to(out.dtype).view_as(out)
    return dict(
        zip(
            ("out", "q", "k", "v", "lam"),
            (out, *torch.autograd.grad(out, inputs, grad)),
            strict=True,
        )
    )


def check(inputs, mask, tolerance=2e-6):
    def kernels(q, k, v, lam):
        return diff_attention(q, k, v, lam, mask=mask, backend="triton")

    def truth(q, k, v, lam):
        return reference(q, k, v, lam.expand(q.shape[:3]), mask=mask, scale=q.shape[-1] ** -0.5)

    found = run(kernels, inputs)
    wanted = run(truth, [x.detach().double().requires_grad_() for x in inputs])
    for what, want in wanted.items():
        error, size = (found[what].double() - want).norm(), want.norm()
        # A softmax over one key has no gradient, so that there is only rounding error.
        assert error < tolerance * (size + 10), f"{what}: {error:.1e} of {size:.1e}"


def check_softmax(N, M, H, G, D, E, mask, dtype=torch.float32, tolerance=2e-6):
    shapes = (BATCH, N, H, D), (BATCH, M, G, D), (BATCH, M, G, E)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]

    def run_all(backend, inputs):
        out = softmax_attention(*inputs, mask=mask, backend=backend)
        grad = torch.linspace(-1, 1, out.numel()).to(out.dtype).view_as(out)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    exact = [x.detach().double().requires_grad_() for x in inputs]
    pairs = zip(run_all("triton", inputs), run_all("reference", exact), strict=True)
    for what, (found, want) in zip(("out", "q", "k", "v"), pairs, strict=True):
        error, size = (found.double() - want).norm(), want.norm()
        assert error < tolerance * (size + 10), f"{what}: {error:.1e} of {size:.1e}"


NAMES = list(masks(70))
# The code that reads masks is that of two maps.
OF_ONE_MAP = ("full", "causal window", "prefix", "shuffled documents", "everything", "nothing")


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("name", OF_ONE_MAP)
def test_one_map(name):
    check_softmax(70, 70, 1, 1, 16, 16 << OF_ONE_MAP.index(name) % 2, masks(70)[name])


@pytest.mark.usefixtures("wrapping")
def test_one_map_of_other_lengths():
    check_softmax(33, 70, 4, 2, 24, 40, masks(70)["causal documents"])
    check_softmax(40, 17, 2, 1, 16, 32, AttentionMask(causal=True))
    check_softmax(5, 0, 2, 1, 16, 32, AttentionMask())


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("name", NAMES)
def test_every_mask(name):
    index = NAMES.index(name)
    C, H = 1 + index % 2, 1 + index // 2 % 2
    check(make_inputs(70, 70, H, 1, C, 16, 32), masks(70)[name])


# Each kind of range that depends on the number of queries.
OF_FEWER = ("full", "causal", "prefix", "causal documents", "causal holes", "everything")


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("name", OF_FEWER)
def test_fewer_queries_than_keys(name):
    C = 1 + OF_FEWER.index(name) % 2
    check(make_inputs(33, 70, 1, 1, C, 16, 16), masks(70)[name])


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("mask", [AttentionMask(causal=True), AttentionMask(window=7)])
def test_more_queries_than_keys(mask):
    check(make_inputs(40, 17, 2, 1, 2, 16, 32), mask)


@pytest.mark.parametrize(("D", "E", "C"), [(32, 64, 2), (24, 48, 2), (40, 40, 1), (16, 136, 2)])
def test_widths(D, E, C):
    check(make_inputs(20, 20, 2, 1, C, D, E, lam_shape=()), AttentionMask(causal=True))


def test_half_precision():
    inputs = make_inputs(40, 40, 2, 1, 2, 16, 32, dtype=torch.float16)
    check(inputs, AttentionMask(causal=True), tolerance=2e-3)


@pytest.mark.parametrize("N", [1, 63, 65])
def test_awkward_lengths(N):
    check(make_inputs(N, N, 1, 1, 2, 16, 32), AttentionMask(causal=True))


def test_strided_inputs():
    q, *_, lam = make_inputs(20, 20, 2, 2, 2, 16, 32)
    shared = q[..., :1, :].detach().requires_grad_()  # one query for both components
    spread = torch.randn(BATCH, 20, 2, 4, 16).requires_grad_()
    turned = torch.randn(BATCH, 2, 32, 20).requires_grad_()

    def views(op):
        def call(shared, spread, turned, lam):
            q, v = shared.expand(-1, -1, -1, 2, -1), turned.permute(0, 3, 1, 2)
            return op(q, spread[..., 0::2, :], v, lam)

        return call

    mask = AttentionMask(causal=True)
    inputs = [shared, spread, turned, lam]
    found = run(views(lambda *x: diff_attention(*x, mask=mask, backend="triton")), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = run(views(lambda *x: diff_attention(*x, mask=mask, backend="reference")), exact)
    for what, want in wanted.items():
        torch.testing.assert_close(found[what].double(), want, msg=what, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_offsets_of_more_than_32_bits(axis, tmp_path):
    """Forward, backward and decoding with strides beyond 32 bits for inputs and gradients."""
    shapes = (3, 3, 3, 2, 16), (3, 3, 3, 2, 16), (3, 3, 3, 16), (3, 3, 3)
    near = [torch.randn(shape) for shape in shapes]
    grad = torch.randn(3, 3, 3, 16)
    *inputs, far_grad = (
        far_apart(tensor, axis, tmp_path / str(index)) for index, tensor in enumerate((*near, grad))
    )
    mask = AttentionMask(causal=True)
    wanted = diff_attention(*near, mask=mask, backend="reference")
    torch.testing.assert_close(diff_attention(*inputs, mask=mask, backend="triton"), wanted)
    grads = []
    for backend, tensors, last in (("triton", inputs, far_grad), ("reference", near, grad)):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        out = diff_attention(*leaves, mask=mask, backend=backend)
        grads.append((out, *torch.autograd.grad(out, leaves, last)))
    for found, want in zip(*grads, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("name", NAMES)
def test_decoding(name, monkeypatch):
    """Two of three shapes for each mask, and all pairs of a shape and a number of keys per head."""
    from diffmm.ops.diff_attention.triton import decode

    mask, index = masks(70)[name], NAMES.index(name)
    shapes = list(enumerate(((1, 1, 1), (3, 4, 2), (1, 8, 1))))
    for shape, (N, H, G) in shapes[: index % 3] + shapes[index % 3 + 1 :]:
        monkeypatch.setattr(decode, "FEW_KEYS", (1 << 14) * (shape < 2))
        C = 1 + (index + shape) % 2
        q, k, v, lam = (x.detach() for x in make_inputs(N, 70, H, G, C, 16, 32))
        found = diff_attention(q, k, v, lam, mask=mask, backend="triton")
        exact = (x.double() for x in (q, k, v, lam))
        wanted = diff_attention(*exact, mask=mask, backend="reference")
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def test_rows_that_see_nothing_are_zero():
    mask = masks(70)["nothing"]
    inputs = make_inputs(70, 70, 2, 1, 2, 16, 32)
    found = run(lambda *x: diff_attention(*x, mask=mask, backend="triton"), inputs)
    for what, tensor in found.items():
        assert (tensor[0] == 0).all(), what
        assert (tensor[1] != 0).any() or what == "q", what


@pytest.mark.parametrize(("N", "M"), [(0, 5), (5, 0)])
def test_empty(N, M):
    inputs = make_inputs(N, M, 2, 1, 2, 16, 32)
    found = run(lambda *x: diff_attention(*x, mask=AttentionMask(), backend="triton"), inputs)
    assert all((tensor == 0).all() for tensor in found.values())


def test_operator_is_well_formed():
    from diffmm.ops.diff_attention.triton.op import _attend, _document_labels

    q, k, v, lam = make_inputs(5, 7, 2, 1, 2, 16, 32)
    documents = torch.zeros(BATCH, 7, dtype=torch.long)
    for padding in (None, documents == 0):
        torch.library.opcheck(_document_labels, (documents, padding, 5))
    labels = _document_labels(documents, None, 5)
    assert torch.equal(labels[:, 5:], torch.zeros(BATCH, 7, dtype=torch.int32))
    for for_backward, tensors in ((False, (labels, None)), (True, (None, None))):
        args = (q, k, v, lam, True, None, None, *tensors, 0.25, for_backward)
        if not for_backward:
            args = (*(x.detach() for x in args[:4]), *args[4:])
        torch.library.opcheck(_attend, args, atol=1e-4, rtol=1e-3)


def test_operator_of_the_backward_pass_is_well_formed():
    from diffmm.ops.diff_attention.triton.op import _attend, _attend_backward

    q, k, v, lam = (x.detach() for x in make_inputs(5, 7, 2, 1, 2, 16, 32))
    labels = torch.zeros(BATCH, 5 + 7, dtype=torch.int32)
    mask = (True, None, None, labels, None, 0.25)
    out, second, lse = _attend(q, k, v, lam, *mask, True)
    args = (torch.randn_like(out), q, k, v, lam, out, second, lse, *mask)
    torch.library.opcheck(_attend_backward, args, atol=1e-4, rtol=1e-3)


def test_operator_of_decoding_is_well_formed():
    from diffmm.ops.diff_attention.triton.op import _decode

    q, k, v, lam = (x.detach() for x in make_inputs(1, 7, 2, 1, 2, 16, 32))
    documents = torch.zeros(BATCH, 7, dtype=torch.long)
    end = torch.tensor(5)
    for tensors in ((None, None, None), (documents, None, None), (None, documents == 0, end)):
        args = (q, k, v, lam, True, None, None, *tensors, 0.25)
        torch.library.opcheck(_decode, args, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("wrapping")
def test_one_graph_serves_every_length():
    counter = CompileCounterWithBackend("aot_eager")

    def op(q, k, v, lam, padding):
        mask = AttentionMask(causal=True, key_padding=padding)
        return diff_attention(q, k, v, lam, mask=mask, backend="triton") * 2

    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for length in (20, 9):
        inputs, padding = make_inputs(length, length, 2, 1, 2, 16, 32), torch.rand(2, length) > 0.2
        for tensor in (*inputs, padding):
            torch._dynamo.mark_dynamic(tensor, 1)
        found = run(partial(compiled, padding=padding), inputs)
        wanted = run(partial(op, padding=padding), inputs)
        for what, want in wanted.items():
            torch.testing.assert_close(found[what], want, msg=what)
    assert counter.frame_count == 1


def test_recomputed_in_the_backward_pass():
    inputs = make_inputs(20, 20, 2, 1, 1, 16, 16)

    def op(*x):
        return diff_attention(*x, mask=AttentionMask(causal=True), backend="triton")

    found = run(lambda *x: checkpoint(op, *x, use_reentrant=False), inputs)
    for what, want in run(op, inputs).items():
        assert torch.equal(found[what], want), what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "needs bfloat16, float16 or float32, got torch.float64"),
        ({"D": 20}, "needs a head dimension D that is a multiple of 8 and at most 128, got 20"),
        ({"D": 136}, "needs a head dimension D that is a multiple of 8 and at most 128, got 136"),
        ({"E": 264}, "needs a value dimension E that is a multiple of 8 and at most 256, got 264"),
    ],
)
def test_refuses_what_it_cannot_serve(change, message):
    sizes = {"N": 4, "M": 4, "H": 2, "G": 1, "C": 2, "D": 16, "E": 32, **change}
    with pytest.raises(ValueError, match=message):
        diff_attention(*make_inputs(**sizes), mask=AttentionMask(), backend="triton")


def test_refuses_a_negative_scale():
    inputs = make_inputs(4, 4, 2, 1, 2, 16, 32)
    with pytest.raises(ValueError, match=r"needs a positive scale, got -1\.0"):
        diff_attention(*inputs, mask=AttentionMask(), scale=-1.0, backend="triton")


def test_refuses_documents_of_queries_that_stand_before_every_key():
    mask = AttentionMask(document_ids=torch.zeros(BATCH, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="a key for every query, got 5 queries and 4 keys"):
        diff_attention(*make_inputs(5, 4, 2, 1, 2, 16, 32), mask=mask, backend="triton")


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("num_queries", [300, 260])
@pytest.mark.parametrize("name", ["documents", "shuffled", "padding", "holes", "both"])
def test_ranges_of_looked_up_masks(name, num_queries):
    """They contain all pairs that attend, and of the full ranges nothing else; for documents in one
    piece, a tile within one of them sees all of it in full."""
    num_keys, block = 300, 32
    keys = torch.arange(num_keys)
    documents = torch.stack([keys // 110 + 2**40, (keys > 200).long()])
    padding = torch.stack([keys < 270, keys >= 40])
    fields = {
        "documents": {"document_ids": documents},
        "shuffled": {"document_ids": torch.randint(3, (BATCH, num_keys))},
        "padding": {"key_padding": padding},
        "holes": {"key_padding": torch.rand(BATCH, num_keys) > 0.1},
        "both": {"document_ids": documents, "key_padding": padding},
    }[name]
    mask = AttentionMask(**fields)
    sees = mask.to_bool(num_queries, num_keys).expand(BATCH, 1, num_queries, num_keys)[:, 0]
    found = KernelMask.of(mask, num_queries, num_keys)
    for ranges, pairs in (
        (found.key_ranges(BATCH, num_queries, num_keys, block), sees),
        (found.query_ranges(BATCH, num_queries, num_keys, block), sees.transpose(1, 2)),
    ):
        for b, tile in itertools.product(range(BATCH), range(ranges.shape[1])):
            low, high, full_low, full_high, _ = ranges[b, tile].tolist()
            own = pairs[b, tile * block : (tile + 1) * block]
            outside = own.clone()
            outside[:, low:high] = False
            assert not outside.any()
            assert own[:, full_low:full_high].all()
            if name in ("documents", "padding", "both") and own.any(0).equal(own.all(0)):
                assert max(full_high - full_low, 0) == int(own[0].sum())


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("num_queries", [300, 260])
@pytest.mark.parametrize("name", ["documents", "padding", "hole", "shuffled", "in two pieces"])
def test_documents_in_runs(name, num_queries):
    """Where a tile says so, each query of a causal mask attends to all keys from the one that is
    its label to itself. All tiles say so that can, and no other."""
    num_keys, block = 300, 32
    keys = torch.arange(num_keys)
    documents = torch.stack([keys // 110 + 2**40, (keys > 200).long()])
    real = torch.ones(BATCH, num_keys, dtype=torch.bool)
    if name == "padding":
        real = torch.stack([keys < 270, keys >= 40])
    if name == "hole":
        real[:, 130] = False
    if name == "shuffled":
        documents = torch.randint(3, (BATCH, num_keys))
    if name == "in two pieces":
        documents[1, 100:140] = 7
    mask = AttentionMask(causal=True, document_ids=documents, key_padding=real)
    sees = mask.to_bool(num_queries, num_keys)[:, 0]
    found = KernelMask.of(mask, num_queries, num_keys)
    ranges = found.key_ranges(BATCH, num_queries, num_keys, block)
    said = 0
    for b, tile in itertools.product(range(BATCH), range(ranges.shape[1])):
        queries = torch.arange(tile * block, min((tile + 1) * block, num_queries))
        first = found.labels[b, queries]
        runs = (keys >= first[:, None]) & (keys <= queries[:, None])
        can = num_queries == num_keys and sees[b, queries].equal(runs)
        assert ranges[b, tile, 4] == can
        said += can
    few = {"documents": 20, "padding": 10, "hole": 10, "shuffled": 0, "in two pieces": 14}
    assert (said >= few[name]) == (num_queries == num_keys) or name == "shuffled"


@pytest.mark.usefixtures("wrapping")
@pytest.mark.parametrize("most_groups", [16, 64])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 50), (2, 128), (1, 200)])
def test_kth_largest(rows, size, most_groups, monkeypatch):
    from diffmm.ops import kth_largest_kernel

    # Groups of one number and of several, the last of which is not full.
    monkeypatch.setattr(kth_largest_kernel, "MOST_GROUPS", most_groups)
    monkeypatch.setattr(kth_largest_kernel, "GROUPS_PER_PROGRAM", 8)
    x = torch.randn(rows, size) * 10.0 ** torch.randint(-30, 30, (rows, size))
    x[0, : size // 4] = x[0, 0]  # ties
    x[-1, -(size // 5) :] = -torch.inf
    x[-1, 0] = 0.0
    numbers = sorted({1, 2, 9, size // 2, size - 1, size} & set(range(1, size + 1)))
    tried = [k for k in numbers if kth_largest_kernel.fits(size, k)]
    assert len(tried) >= min(3, size)
    for k in tried:
        found = kth_largest_kernel.launch(x, k)
        assert torch.equal(found, x.topk(k).values[:, -1:])


def test_which_kth_largest_fits():
    from diffmm.ops.kth_largest_kernel import fits

    # A row of up to 1,024 numbers has a group for each.
    fitting = [(1, 1), (1024, 1024), (1025, 513), (32000, 512), (152064, 128)]
    others = [(1025, 514), (152064, 129)]
    assert [fits(*each) for each in fitting + others] == [True] * 5 + [False] * 2
