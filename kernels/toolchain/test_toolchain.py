"""Tests that the checks can fail: `python3 -m unittest discover -s kernels/toolchain -t kernels`"""

import contextlib
import io
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import compile as command
from toolchain import occupancy, ptxas, sources

COPY = """#include "own.cuh"
extern "C" __global__ void __launch_bounds__(64) copy(const float* x, float* y) { y[threadIdx.x] = SCALE * x[threadIdx.x]; }
"""


class Commands(unittest.TestCase):
    """Each test has a folder of its own with one kernel that compiles."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.sources, self.output = Path(folder.name) / "kernels", Path(folder.name) / "ptx"
        self.sources.mkdir()
        self.write("copy.cu", COPY)
        self.write("own.cuh", "#pragma once\n#define SCALE 2.0f\n")

    def write(self, name, text):
        (self.sources / name).write_text(text, encoding="utf-8")

    def ptx(self, name="copy.ptx"):
        return (self.output / name).read_text(encoding="utf-8")

    def table(self):
        return self.ptx("kernels.md")

    def run_with(self, *more):
        """The exit status, and what was said on the way."""
        said = io.StringIO()
        arguments = ["compile.py", "--sources", str(self.sources), "--output", str(self.output), *more]
        with mock.patch("sys.argv", arguments), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return command.main(), said.getvalue()

    def assert_refused(self, *words, arguments=("--check",)):
        status, said = self.run_with(*arguments)
        self.assertEqual(status, 1, said)
        for word in words:
            self.assertIn(word, said)

    def compile(self):
        status, said = self.run_with()
        self.assertEqual(status, 0, said)

    def test_what_was_compiled_is_current_and_the_same_again(self):
        self.compile()
        before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in self.output.iterdir()}
        self.assertEqual(before.keys(), {"copy.ptx", "kernels.md"})
        self.assertEqual(self.run_with("--check")[0], 0)
        self.compile()
        self.assertEqual(before, {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in self.output.iterdir()})

    def test_nothing_machine_dependent_is_in_the_ptx(self):
        self.compile()
        text = self.ptx()
        for word in (str(self.sources), "/tmp", "Build ID"):
            self.assertNotIn(word, text)

    def test_a_changed_header_is_stale(self):
        self.compile()
        self.write("own.cuh", "#pragma once\n#define SCALE 3.0f\n")
        self.assert_refused("copy.ptx is not what the sources give: run python3 kernels/compile.py")

    def test_a_changed_byte_of_ptx_is_found(self):
        self.compile()
        changed = self.ptx().replace("ld.global.f32", "ld.volatile.global.f32")
        self.assertNotEqual(changed, self.ptx())
        (self.output / "copy.ptx").write_text(changed, encoding="utf-8")
        self.assert_refused("copy.ptx is not what the sources give")

    def test_ptx_and_table_may_not_be_missing(self):
        self.compile()
        for file in ("copy.ptx", "kernels.md"):
            (self.output / file).unlink()
        self.assert_refused("copy.ptx is missing", "kernels.md is missing")

    def test_ptx_without_a_kernel_is_found_and_deleted(self):
        self.compile()
        (self.output / "copy.ptx").rename(self.output / "old.ptx")
        self.assert_refused("old.ptx has no kernel file")
        self.compile()
        self.assertFalse((self.output / "old.ptx").exists())

    def test_without_kernels_nothing_is_left(self):
        self.compile()
        (self.sources / "copy.cu").unlink()
        self.assert_refused("copy.ptx has no kernel file", "kernels.md has no kernel file")
        status, said = self.run_with()
        self.assertEqual((status, list(self.output.iterdir())), (0, []))
        self.assertIn("no kernels", said)
        self.assertEqual(self.run_with("--check")[0], 0)

    def test_shared_memory_counts_and_names_existing_kernels(self):
        self.compile()
        named = '#include "common/platform.cuh"\n' + COPY + "SHARED_BYTES({}, 60000);\n"
        self.write("copy.cu", named.replace("{}", "copy"))
        self.assert_refused("kernels.md is not what the sources give")
        self.compile()
        self.assertIn("| `copy` | 2: 4/64 s | 1: 2/48 s |", self.table())
        self.write("copy.cu", named.replace("{}", "copies"))
        self.assert_refused("SHARED_BYTES names copies, which no kernel file defines")

    def test_a_spill_is_refused_on_every_architecture(self):
        values = 96
        loads = "".join(f"float v{i} = x[{i} * n];\n" for i in range(values))
        sums = "".join(f"y[{i}] = v{i} + v{values - 1 - i};\n" for i in range(values))
        self.write(
            "copy.cu",
            f'extern "C" __global__ void __launch_bounds__(1024, 1) copy(const volatile float* x, float* y, int n) {{\n'
            f"{loads}__syncthreads();\n{sums}}}\n",
        )
        for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
            self.assert_refused(f"copy.ptx for {architecture}: ptxas warning : Registers are spilled", arguments=())

    def test_a_stack_frame_is_refused(self):
        self.write(
            "copy.cu",
            'extern "C" __global__ void __launch_bounds__(64) copy(const float* x, float* y, int n) {\n'
            "float v[16]; for (int i = 0; i < 16; ++i) v[(i * n) % 16] = x[i]; y[threadIdx.x] = v[n]; }\n",
        )
        self.assert_refused("Local memory used for function 'copy'", arguments=())

    def test_a_remark_of_the_compiler_is_refused(self):
        self.write("copy.cu", COPY.replace("{ y", "{ int unused; y"))
        self.assert_refused("copy.cu does not compile without remarks", "unused", arguments=())

    def test_an_error_is_shown_with_file_and_line(self):
        self.write("own.cuh", "#pragma once\n#define SCALE 2.0f\nint broken(\n")
        self.assert_refused("own.cuh(", "error", arguments=())

    def test_a_broken_file_keeps_no_other_from_being_compiled(self):
        self.compile()
        table = self.table()
        self.write("broken.cu", "int broken(\n")
        self.write("copy.cu", COPY.replace("64", "32"))
        self.assert_refused("broken.cu does not compile", arguments=())
        self.assertIn(".maxntid 32", self.ptx())
        self.assertEqual(self.table(), table)

    def test_a_missing_header_is_named(self):
        (self.sources / "own.cuh").unlink()
        self.assert_refused("copy.cu includes own.cuh, which does not exist", arguments=())

    def test_a_kernel_without_bounds_is_refused(self):
        self.write("copy.cu", COPY.replace("__launch_bounds__(64)", ""))
        self.assert_refused("copy has no __launch_bounds__", arguments=())

    def test_one_header_spelled_twice_is_one_file(self):
        self.write("pair.cuh", '#include "../kernels/own.cuh"\n')
        self.write("copy.cu", '#include "pair.cuh"\n' + COPY)
        self.compile()

    def test_kernels_for_compute_capability_9_0_alone(self):
        (self.sources / "copy.cu").rename(self.sources / "copy_sm90a.cu")
        self.compile()
        self.assertIn(".target sm_90a", self.ptx("copy_sm90a.ptx"))
        self.assertIn("| kernel | sm_90a |", self.table())


    def test_machine_code_without_the_wanted_instruction_is_found(self):
        ptx = ".visible .entry multiply(\n)\n{ wgmma.mma_async }\n.visible .entry copy(\n)\n{ ld.global }\n"
        good = ".text.multiply:\n HGMMA.64x128x16.F32 R24\n.text.copy:\n LDL R1\n"
        self.assertEqual(list(ptxas.matrix_units("a", ptx, good)), [])
        for bad, word in ((good.replace("HGMMA", "HMMA"), "no HGMMA"), (good.replace("R24", "R24\n STL [R1]"), "local memory")):
            [problem] = ptxas.matrix_units("a", ptx, bad)
            self.assertIn("multiply", problem)
            self.assertIn(word, problem)


class Waits(unittest.TestCase):
    PTX = "\n.target sm_80\n.visible .entry k(\n)\n.maxntid 32\n// begin inline asm\n// griddepcontrol.wait;\n"

    def test_comments_become_instructions_where_there_are_such(self):
        for architecture in ("sm_80", "sm_89"):
            self.assertEqual(ptxas.as_loaded(self.PTX, architecture), self.PTX)
        for architecture in ("sm_90", "sm_100", "sm_120"):
            loaded = ptxas.as_loaded(self.PTX, architecture)
            self.assertIn("\ngriddepcontrol.wait;\n", loaded)
            self.assertIn("\n.target sm_90\n", loaded)

    def test_nothing_comes_before_the_wait(self):
        def found(*code):
            return list(ptxas.early_accesses("a", self.PTX, "\n".join((".text.k:", *code))))

        self.assertEqual(found("ULDC R1", "LDC R2", "STS [R1]", "ACQBULK", "LDG.E R3", "STG.E [R2]"), [])
        for early in ("LDG.E.CONSTANT R3", "@!P1 STG.E [R2]", "LDGSTS.E [R1]", "ATOMG.E.INC R2", "UBLKCP.S.G [UR4]", "LD.E R2"):
            [problem] = found(early, "ACQBULK")
            self.assertIn(f"k has {early.removeprefix('@!P1 ').split('.')[0]} before", problem)
        [problem] = found("LDG.E R3")
        self.assertIn("k does not wait", problem)


class Hash(unittest.TestCase):
    def test_equals_what_tests_artefacts_rs_computes(self):
        # tests/library/artefacts.rs has the same files and the same number.
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "common").mkdir()
            (folder / "a.cu").write_bytes(b'#include "common/b.cuh"\r\n#include "common/emulator.hpp"\r\nint a;\n')
            (folder / "common" / "b.cuh").write_text('  # include "c.cuh" // beside this file\n')
            (folder / "common" / "c.cuh").write_bytes('#include "common/b.cuh"\nint é;'.encode())
            source = sources.read(folder / "a.cu", folder)
            self.assertEqual(list(source.files), ["a.cu", "common/b.cuh", "common/c.cuh"])
            self.assertEqual(source.hash, "0aaba14c2484491d")

    def test_fnv1a(self):
        self.assertEqual(sources.fnv1a(b"foobar"), 0x85944171F73967E8)


class Remarks(unittest.TestCase):
    def test_any_other_message_is_a_remark(self):
        clean = (
            "ptxas info    : 0 bytes gmem\n"
            "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
            "ptxas info    : Function properties for f\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 10 registers, used 1 barriers, 64 bytes smem, 360 bytes cmem[0]\n"
            "ptxas info    : Compile time = 1.9 ms\n"
        )
        usage, remarks = ptxas.parse(clean)
        self.assertEqual((usage, remarks), ({"f": ptxas.Usage(registers=10, static_shared=64)}, []))
        for line in (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to …",
            "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.",
            "ptxas warning : Value of threads per SM for entry f is out of range. .minnctapersm will be ignored",
            "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        ):
            self.assertEqual(ptxas.parse(clean + line + "\n")[1], [line.strip()])


class Occupancy(unittest.TestCase):
    def test_numbers_of_cuda_occupancy_h(self):
        for case, blocks in {
            ("sm_80", 256, 128, 0): 2,
            ("sm_80", 256, 129, 0): 1,
            ("sm_80", 128, 168, 98304): 1,
            ("sm_86", 32, 16, 0): 16,
            ("sm_86", 256, 64, 101376): 1,
            ("sm_86", 256, 64, 101377): 0,
            ("sm_89", 32, 16, 0): 24,
            ("sm_90", 256, 64, 115000): 2,
            ("sm_90", 1024, 65, 0): 0,
            ("sm_90", 96, 255, 0): 2,
            ("sm_120", 512, 40, 49152): 2,
        }.items():
            self.assertEqual(occupancy.resident(*case)[0], blocks, case)


if __name__ == "__main__":
    unittest.main()
