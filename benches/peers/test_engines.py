"""Every engine's loss and gradients against float64. Skipped without PyTorch; Triton kernels run in its interpreter on the CPU."""

import contextlib
import importlib.util
import io
import math
import os
import pathlib
import sys
import tempfile
import types
import unittest
from unittest import mock

HAVE_TORCH = importlib.util.find_spec("torch") is not None
if HAVE_TORCH:
    import torch

    GPU = torch.cuda.is_available()
    if not GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined
    DEVICE = torch.device("cuda" if GPU else "cpu")
    import engines
    import reference
    import table
    from losses import LOSSES
    from engines import TEMPERATURE, Autograd, make_inputs
    from reference import Judge, Reference
    from torch_step import samtone_query


def why_no_triton() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    if not HAVE_TORCH or importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not GPU:
        import numpy

        if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
            return "Triton's interpreter needs NumPy below 2.4"
    return None


def joint(query: "torch.Tensor", passage: "torch.Tensor", temperature: float) -> "torch.Tensor":
    """samtone_query_joint: one softmax over passages, other queries and the passage's queries; the positive is in it twice."""
    query, passage = (torch.nn.functional.normalize(x, dim=-1) for x in (query, passage))
    logits = query @ passage.T / temperature
    same_tower = (query @ query.T / temperature).fill_diagonal_(-math.inf)
    return (torch.cat([logits, same_tower, logits.T], dim=1).logsumexp(dim=1) - logits.diagonal()).mean()


def qwen3(query: "torch.Tensor", passage: "torch.Tensor", temperature: float, margin: float = 0.1) -> "torch.Tensor":
    """One softmax over passages, other queries and other passages, without those nearer than the positive by more than the margin."""
    query, passage = (torch.nn.functional.normalize(x, dim=-1) for x in (query, passage))
    blocks = [query @ passage.T, (query @ query.T).fill_diagonal_(-math.inf), (passage @ passage.T).fill_diagonal_(-math.inf)]
    positive = blocks[0].diagonal()
    cosines = torch.cat(blocks, dim=1)
    cosines = cosines.masked_fill(cosines > positive[:, None] + margin, -math.inf)
    return ((cosines / temperature).logsumexp(dim=1) - positive / temperature).mean()


def clip(query: "torch.Tensor", passage: "torch.Tensor", temperature: float) -> "torch.Tensor":
    query, passage = (torch.nn.functional.normalize(x, dim=-1) for x in (query, passage))
    logits, target = query @ passage.T / temperature, torch.arange(len(query), device=query.device)
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


def near_the_margin(inputs: "engines.Inputs") -> "engines.Inputs":
    """Passages and queries that resemble each other in groups of three: a margin of 0.1 drops about two of each tower for a row."""
    query, passage = inputs.wide
    leader = torch.arange(len(query), device=query.device) // 3 * 3
    narrow = tuple((x + 2 * x[leader]).to(inputs.narrow[0].dtype) for x in (query, passage))
    return engines.Inputs(narrow, tuple(x.float() for x in narrow))


def dense(function, inputs: "engines.Inputs", temperature: float = 0.01) -> "Reference":
    """Loss and gradients by float64 autograd of the plain text."""
    leaves = [x.double().requires_grad_() for x in inputs.narrow]
    loss = function(*leaves, temperature)
    loss.backward()
    return Reference(loss.item(), tuple(leaf.grad for leaf in leaves), None)


@unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed")
class Judged(unittest.TestCase):
    """The judge itself, against autograd."""

    def test_every_loss_in_uneven_chunks_and_by_samples(self) -> None:
        inputs = near_the_margin(make_inputs(70, 24, DEVICE))
        whole, reference.CHUNK_BYTES = reference.CHUNK_BYTES, 8 * 70 * 9
        self.addCleanup(setattr, reference, "CHUNK_BYTES", whole)
        judge = Judge(*inputs.narrow)
        written = {
            "samtone_query": samtone_query,
            "samtone_query_joint": joint,
            "qwen3": qwen3,
            "qwen3_cold": qwen3,
            "clip": clip,
        }
        self.assertEqual(set(written), set(LOSSES))
        for name, function in written.items():
            exact = dense(function, inputs, LOSSES[name].temperature)
            for rows in (None, torch.tensor([3, 69, 0], device=DEVICE)):
                with self.subTest(loss=name, sampled=rows is not None):
                    judged = judge.reference(name, rows)
                    self.assertAlmostEqual(judged.loss, exact.loss, places=12)
                    self.assertLess(judged.errors(exact.gradients), 1e-10)

    def test_an_error_in_either_tower_counts_and_nan_is_no_success(self) -> None:
        exact = dense(samtone_query, make_inputs(20, 8, DEVICE))
        for tower in range(2):
            wrong = [x.clone() for x in exact.gradients]
            wrong[tower] *= 1.5
            self.assertAlmostEqual(exact.errors(tuple(wrong)), 0.5)
            wrong[tower][0, 0] = math.nan
            self.assertTrue(math.isnan(exact.errors(tuple(wrong))))


@unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed")
class Files(unittest.TestCase):
    """Gradients that another program wrote."""

    def test_written_gradients_are_judged(self) -> None:
        import judge_files

        inputs = make_inputs(20, 8, torch.device("cpu"))
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

        def write(loss: str, factor: float) -> None:
            query, passage = (g.float() for g in Judge(*inputs.narrow).reference(loss).gradients)
            arrays = (*(x.view(torch.uint16) for x in inputs.narrow), query, passage * factor)
            (folder / loss).mkdir(exist_ok=True)
            for name, array in zip(judge_files.SUFFIXES, arrays):
                (folder / loss / f"20-8-{name}").write_bytes(array.numpy().tobytes())

        def judge() -> tuple[int, str]:
            arguments = ["judge_files.py", str(folder), "--out", str(folder), "--device", "cpu"]
            with mock.patch("sys.argv", arguments), contextlib.redirect_stdout(io.StringIO()) as said:
                return judge_files.main(), said.getvalue()

        self.assertEqual(judge()[0], 1)  # nothing to judge
        write("samtone_query", 1.0)
        write("qwen3", 1.0005)
        self.assertEqual(judge()[0], 0)
        self.assertRegex((folder / "samtone-errors-qwen3.csv").read_text(), r"20,8,5\.0\d\de-04,20")
        for factor in (1.25, math.nan):
            write("samtone_query", factor)
            code, said = judge()
            self.assertEqual(code, 1)
            self.assertIn("more than the 1e-03 that is allowed", said)
        (folder / "qwen3" / "20-8-query.bf16").rename(folder / "qwen3" / "20-9-query.bf16")
        with self.assertRaisesRegex(ValueError, "20 x 9 of torch.bfloat16 are 360"):
            judge_files.judged(folder / "qwen3", 20, 9, torch.device("cpu"), "qwen3")

    def test_large_batches_are_sampled(self) -> None:
        rows = reference.sampled_rows(40_000, torch.device("cpu"))
        self.assertEqual(len(set(rows.tolist())), reference.SAMPLED)
        self.assertIsNone(reference.sampled_rows(reference.JUDGED, torch.device("cpu")))


@unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed")
class PlainPyTorch(unittest.TestCase):
    def judge(self, function, loss, tolerance: float, autocast: bool = False) -> None:
        inputs = make_inputs(70, 24, DEVICE)
        exact = dense(loss, inputs)
        step = Autograd(inputs, function, autocast)
        for _ in range(2):  # gradients are those of one step, not sums
            step.run()
        self.assertLess(abs(step.loss() - exact.loss), tolerance * max(1.0, exact.loss))
        self.assertLess(exact.errors(step.gradients), tolerance)

    def setUp(self) -> None:
        if HAVE_TORCH:
            torch.set_float32_matmul_precision("highest")

    def test_eager(self) -> None:
        self.judge(samtone_query, samtone_query, 1e-5)
        self.judge(samtone_query, samtone_query, 0.2, autocast=True)

    def test_checkpointed_chunks(self) -> None:
        from torch_losses import chunked

        for size in (70, 32, 7):
            with self.subTest(size=size):
                self.judge(lambda q, p, t, size=size: chunked(q, p, t, size), samtone_query, 1e-5)
        self.judge(lambda q, p, t: chunked(q, p, t, 32), samtone_query, 0.2, autocast=True)

    @unittest.skipUnless(importlib.util.find_spec("sentence_transformers"), "sentence-transformers is not installed")
    def test_sentence_transformers(self) -> None:
        import sentence

        whole, sentence.MINI_BATCH = sentence.MINI_BATCH, 32
        self.addCleanup(setattr, sentence, "MINI_BATCH", whole)
        for cached in (False, True):
            for one_call, loss in ((False, samtone_query), (True, joint)):
                with self.subTest(cached=cached, joint=one_call):
                    self.judge(sentence.Ranking(cached, one_call, TEMPERATURE), loss, 1e-5)


@unittest.skipIf(why_no_triton(), why_no_triton() or "")
class TritonKernels(unittest.TestCase):
    """Rows of any norm, blocks that divide nothing, cosines for which one shift for all rows would underflow.

    Judged by the judge, since float64 autograd of the plain text has no digits left where every probability is near 1.
    """

    ROWS = 37
    KINDS = ("plain", "norms", "opposed", "solved")

    def inputs(self, kind: str, dtype: "torch.dtype") -> "engines.Inputs":
        inputs = make_inputs(self.ROWS, 24, DEVICE, dtype=dtype)
        query, passage = inputs.wide
        if kind == "norms":
            scale = torch.linspace(0.5, 4.0, self.ROWS, device=DEVICE)[:, None]
            query, passage = query * scale, passage * scale.flip(0)
        elif kind == "opposed":  # every cosine but a few near -1: exp(-100) of the positive's is all there is
            centre = query[:1]
            query, passage = centre + 0.05 * query, -centre + 0.05 * passage
        elif kind == "solved":  # positives of nearly 1: every probability near 1, and gradients of tiny numbers
            passage = query + 0.6 * passage
        return engines.Inputs((query.to(dtype), passage.to(dtype)), (query.to(dtype).float(), passage.to(dtype).float()))

    def judge(self, build, dtype: "torch.dtype", tolerance: float, kinds: tuple[str, ...] = ("plain",)) -> None:
        for kind in kinds:
            with self.subTest(kind=kind):
                inputs = self.inputs(kind, dtype)
                exact = Judge(*inputs.narrow).reference("samtone_query")
                step = build(*inputs.narrow)
                for _ in range(2):
                    step.run()
                self.assertLess(abs(step.loss() - exact.loss), 1e-5 * max(1.0, exact.loss))
                self.assertLess(exact.errors(step.gradients), tolerance)

    def test_blocks_of_products(self) -> None:
        from fused import Blocks, Fused

        for blocks in (Blocks(37, 37), Blocks(8, 16, kept=True), Blocks(16, 37, tile_m=16, tile_n=256)):
            with self.subTest(blocks=str(blocks)):
                self.judge(lambda q, p, b=blocks: Fused(q, p, TEMPERATURE, b), torch.bfloat16, 5e-3)
        self.judge(lambda q, p: Fused(q, p, TEMPERATURE, Blocks(16, 24)), torch.bfloat16, 5e-3, self.KINDS)
        # Probabilities below 6e-11 vanish in f16, so not "solved".
        self.judge(lambda q, p: Fused(q, p, TEMPERATURE, Blocks(16, 24), torch.float16), torch.bfloat16, 5e-4, self.KINDS[:3])

    def test_blocks_higher_than_wide_are_refused(self) -> None:
        from fused import Blocks, Fused

        step = Fused(*make_inputs(8, 8, DEVICE).narrow, TEMPERATURE, Blocks(8, 4))
        with self.assertRaisesRegex(ValueError, "rows 8 of a block exceed its columns 4"):
            step.run()

    def test_inf_cl_like(self) -> None:
        from inf_cl_like import InfClLike, Tiling

        # The interpreter has no products of bf16.
        dtype, tolerance = (torch.bfloat16, 5e-3) if GPU else (torch.float16, 5e-4)
        self.judge(lambda q, p: InfClLike(q, p, TEMPERATURE, Tiling(16, rows=32, cols=32)), dtype, tolerance, self.KINDS[:3])
        self.judge(lambda q, p: InfClLike(q, p, TEMPERATURE, Tiling(32)), dtype, tolerance)


@unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed")
class MemoryEfficient(unittest.TestCase):
    """memeff's two losses against the definition of our presets."""

    def judge(self, loss: str, inputs: "engines.Inputs", kernels: str, tolerance: float) -> None:
        import memory_efficient

        exact = Judge(*inputs.narrow).reference(loss)
        step = Autograd(inputs, memory_efficient.MemoryEfficient(loss, kernels), autocast=False)
        for _ in range(2):
            step.run()
        self.assertLess(abs(step.loss() - exact.loss), tolerance * max(1.0, exact.loss))
        self.assertLess(exact.errors(step.gradients), tolerance)

    def test_what_it_is_told_makes_our_presets(self) -> None:
        """On a stand-in that does what the package's documentation says of these arguments."""

        def stand_in(**settings) -> types.SimpleNamespace:
            if settings.pop("stable", True):
                self.fail("gradients are those of the loss for stable=False alone")
            if "margin" not in settings:
                return StandIn(lambda q, p: clip(q, p, **settings))
            self.assertTrue(settings.pop("use_qq_negatives") and settings.pop("use_dd_negatives"))
            return StandIn(lambda q, p: qwen3(q, p, **settings))

        class StandIn:
            def __init__(self, function) -> None:
                self.function = function

            def __call__(self, query: "torch.Tensor", passage: "torch.Tensor") -> "torch.Tensor":
                return self.function(query, passage)

        both = types.SimpleNamespace(MemoryEfficientCLIPLoss=stand_in, MemoryEfficientQwen3Loss=stand_in)
        self.enterContext(mock.patch.dict(sys.modules, {"memeff": both}))
        self.addCleanup(lambda: sys.modules[__name__].__dict__.pop("_FORCE_FA", None))
        inputs = near_the_margin(make_inputs(60, 64, DEVICE))
        for loss in ("qwen3", "clip"):
            with self.subTest(loss=loss):
                self.judge(loss, inputs, "its own choice of kernels", 1e-5)

    @unittest.skipIf(why_no_triton(), why_no_triton() or "")
    @unittest.skipUnless(importlib.util.find_spec("memeff"), "memeff is not installed")
    def test_both_kinds_of_kernels(self) -> None:
        import memory_efficient

        if not GPU:  # it asks for tensors on a GPU and for its capability; Triton's interpreter needs neither
            for name in ("clip_loss", "clip_qwen3_loss"):
                self.enterContext(mock.patch.object(importlib.import_module(f"memeff.{name}"), "_validate_features"))
            self.enterContext(mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)))
        inputs = near_the_margin(make_inputs(60, 64, DEVICE))
        for loss in ("qwen3", "clip"):
            for kernels in memory_efficient.KERNELS:
                with self.subTest(loss=loss, kernels=kernels):
                    self.judge(loss, inputs, kernels, 5e-3 if GPU else 1e-5)


@unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed")
class Names(unittest.TestCase):
    def test_charts_and_losses_name_what_there_is(self) -> None:
        self.assertLessEqual(set(table.CHARTED) - {table.SAMTONE}, set(engines.BY_NAME))
        self.assertLessEqual(set(table.PRODUCTS), set(engines.BY_NAME))
        self.assertEqual({e.loss for e in engines.ENGINES} - {None}, set(reference.LOSSES))


@unittest.skipUnless(HAVE_TORCH, "PyTorch is not installed")
class Products(unittest.TestCase):
    def test_operations_are_exactly_those_named(self) -> None:
        from products import Products as Bare
        from torch.utils.flop_counter import FlopCounterMode

        inputs = make_inputs(64, 16, DEVICE)
        for count in (9, 12):
            for rows in (64, 16):
                step = Bare(*inputs.narrow, rows, count)
                with FlopCounterMode(display=False) as counter:
                    step.run()
                self.assertEqual(counter.get_total_flops(), step.operations())
                self.assertEqual(step.operations(), count * 64**2 * 16)


if __name__ == "__main__":
    unittest.main()
