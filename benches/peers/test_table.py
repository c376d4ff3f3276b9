"""Tables, charts and the driver, on made-up numbers in temporary folders. Needs the standard library alone."""

import contextlib
import csv
import io
import pathlib
import tempfile
import unittest
import xml.etree.ElementTree as xml
from unittest import mock

import run
import summary
import svg
import table

OWN = """NVIDIA Imaginary (9, 0)
rows,dim,milliseconds,tflops,extra_mib,loss
512,64,0.5000,10.0,3.5,1.25
8192,64,5.0000,400.0,40.0,2.5
test result
"""
ANSWERS = """
import json, sys, time
for rows, dim, name in json.loads(sys.argv[1])["tasks"]:
    print(json.dumps({"ready": [rows, dim]}), flush=True)
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        sys.exit("no such instruction")
    print(json.dumps({"ms": 1.0, "restart": name == "spoils"}), flush=True)
    if name == "spoils":
        break
"""


def made_up(folder: pathlib.Path, own: bool = True) -> None:
    lines = [
        {"rows": 512, "dim": 64, "engine": "products 12", "milliseconds": "0.2", "graph_milliseconds": "0.1", "extra_mib": "1.0"},
        {"rows": 512, "dim": 64, "engine": "eager f32", "loss_name": "samtone_query", "milliseconds": "2.0", "extra_mib": "9",
         "gradient_error": "1e-6", "tflops": "3"},
        {"rows": 8192, "dim": 32, "engine": "eager f32", "loss_name": "samtone_query", "milliseconds": "7", "extra_mib": "3000"},
        {"rows": 8192, "dim": 64, "engine": "eager f32", "loss_name": "samtone_query", "milliseconds": "20", "extra_mib": "3000",
         "gradient_error": "2e-6"},
        {"rows": 8192, "dim": 64, "engine": "MNRL autocast", "loss_name": "samtone_query_joint", "milliseconds": "30",
         "extra_mib": "0", "gradient_error": "3e-2"},
        {"rows": 8192, "dim": 64, "engine": "products 12", "milliseconds": "4.0"},
        {"rows": 8192, "dim": 64, "engine": "eager autocast", "loss_name": "samtone_query", "note": "OutOfMemoryError: no room"},
    ]  # fmt: skip
    with open(folder / "peers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, run.COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    if own:
        (folder / "step.txt").write_text(OWN)
        (folder / "samtone-errors.csv").write_text("rows,dim,gradient_error\n8192,64,1.5e-4\n")


class Record(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def generate(self) -> str:
        arguments = ["table.py", str(self.folder), "--error-shape", "8192,64"]
        with mock.patch("sys.argv", arguments), contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(table.main(), 0)
        return (self.folder / "peers.md").read_text()

    def test_table_compares_with_our_own_measurements(self) -> None:
        made_up(self.folder)
        text = self.generate()
        self.assertIn("| **samtone** | 5 | 1.00 | 165 |".replace("165", f"{12 * 8192**2 * 64 / 5e9:.0f}"), text)
        self.assertIn("| eager f32 | 20 | 4.00 |", text)
        self.assertIn("| 1.5e-04 |", text)
        # The faster of launches and graph counts, and says so.
        self.assertIn("| products 12 | 0.1 (graph) | 0.20 |", text)
        self.assertIn("- eager autocast: OutOfMemoryError: no room", text)
        self.assertIn("MNRL autocast¹", text)
        self.assertIn(table.FOOTNOTES["samtone_query_joint"], text)
        self.assertNotIn(table.FOOTNOTES["qwen3"], text)

    def test_another_loss_is_compared_with_our_step_of_that_loss(self) -> None:
        made_up(self.folder)
        with open(self.folder / "peers.csv", "a", newline="") as file:
            rows = (
                {"rows": 8192, "dim": 64, "engine": f"memeff {loss}", "loss_name": loss, "milliseconds": "30"}
                for loss in ("qwen3", "clip")
            )
            csv.DictWriter(file, run.COLUMNS).writerows(rows)
        (self.folder / "step-qwen3.txt").write_text(OWN.replace("5.0000", "10.0000"))
        (self.folder / "samtone-errors-qwen3.csv").write_text("rows,dim,gradient_error\n8192,64,2.5e-4\n")
        text = self.generate()
        self.assertIn(f"| **samtone²** | 10 | 1.00 | {16 * 8192**2 * 64 / 10e9:.0f} | 40 | 2.5e-04 |", text)
        self.assertIn("| memeff qwen3² | 30 | 3.00 |", text)
        self.assertIn("| memeff clip⁴ | 30 |  |", text)  # no step of ours was measured

    def test_our_own_time_is_the_faster_of_launches_and_graph(self) -> None:
        made_up(self.folder)
        header = "rows,dim,milliseconds,tflops,extra_mib,loss,enqueued_milliseconds,graph_milliseconds\n"
        lines = "512,64,0.5000,10.0,3.5,1.25,0.4000,0.2000\n8192,64,5.0000,400.0,40.0,2.5,,\n"
        (self.folder / "step.txt").write_text(header + lines)
        text = self.generate()
        self.assertIn("| **samtone** | 0.2 (graph) | 1.00 |", text)
        self.assertIn("| **samtone** | 5 | 1.00 |", text)

    def test_record_without_our_own_measurements_names_no_ratio(self) -> None:
        made_up(self.folder, own=False)
        text = self.generate()
        self.assertNotIn("**samtone**", text)
        self.assertIn("| eager f32 | 20 |  |", text)

    def test_charts_are_well_formed_and_hold_only_what_was_measured(self) -> None:
        made_up(self.folder)
        self.generate()
        names = {}
        for name in ("time", "memory", "error"):
            root = xml.parse(self.folder / f"{name}.svg").getroot()
            names[name] = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
            self.assertIn("samtone", names[name])
            self.assertNotIn("eager autocast", names[name])
        self.assertIn("MNRL autocast¹", names["time"])
        self.assertNotIn("MNRL autocast¹", names["memory"])  # 0 MiB has no logarithm
        self.assertIn("B (d = 64)", names["time"])  # of two shapes with this B the wider one

    def test_no_record_is_an_error(self) -> None:
        with mock.patch("sys.argv", ["table.py", str(self.folder)]), contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(table.main(), 1)
        self.assertIn("peers.csv is not there", said.getvalue())


CHECKS = """part,check,result,seconds
first,load,ok,21
first,conformance-bf16,FAILED: exit code 101,9
first,step-clip,FAILED: ended after 20 s,20
"""
ENVIRONMENT = """commit 0123abc
date 2026-01-02T03:04:05Z
name, driver_version, memory.total [MiB]
NVIDIA Imaginary, 600.1, 1 MiB
torch 3.0 cuda 14.0 sees 1
"""


class Summary(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def generate(self, code: int = 0) -> str:
        with mock.patch("sys.argv", ["summary.py", str(self.folder)]), contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(summary.main(), code)
        return said.getvalue()

    def test_one_screen_says_how_checks_ended_and_what_steps_took(self) -> None:
        made_up(self.folder)
        (self.folder / "checks-first.csv").write_text(CHECKS)
        (self.folder / "env.txt").write_text(ENVIRONMENT)
        (self.folder / "conformance-bf16.txt").write_text("running 9 tests\n\n---- cuda bf16: gte ----\nloss is 2\n")
        (self.folder / "step-kept.txt").write_text(OWN)
        text = self.generate()
        self.assertEqual(text.strip(), (self.folder / "summary.md").read_text().strip())
        self.assertIn("# One step and its checks: NVIDIA Imaginary", text)
        self.assertIn("2026-01-02, samtone 0123abc, PyTorch 3.0 cuda 14.0 sees 1, driver version 600.1", text)
        self.assertIn("1 of 3 passed.", text)
        self.assertIn("Passed in `first`: load (21 s).", text)
        self.assertIn("| first | **conformance-bf16** | FAILED: exit code 101 (9 s) | cuda bf16: gte: loss is 2 |", text)
        self.assertIn("| first | **step-clip** | FAILED: ended after 20 s (20 s) |  |", text)
        # 5 ms where bare products of as many operations take 4.
        self.assertIn("| **samtone** | 0.5 ms, 5.00 P |  | 5 ms, 1.25 P, 1.5e-04 |", text)
        self.assertIn("| samtone, cosines kept | 0.5 ms, 5.00 P |  | 5 ms, 1.25 P |", text)
        self.assertIn("| eager f32 | 2 ms, 20.00 P, 4.00 S, 1.0e-06 | 7 ms | 20 ms, 5.00 P, 4.00 S, 2.0e-06 |", text)
        self.assertIn("| eager autocast |  |  | – |", text)
        self.assertIn("eager autocast at B = 8192: OutOfMemoryError: no room", text)
        self.assertLess(len(text.splitlines()), 50)

    def test_parts_brought_back_one_by_one_are_one_record(self) -> None:
        (self.folder / "checks-second.csv").write_text("part,check,result,seconds\nsecond,overhead,ok,3\n")
        (self.folder / "checks-first.csv").write_text(CHECKS)
        text = self.generate()
        self.assertIn("2 of 4 passed.", text)
        self.assertLess(text.index("`first`"), text.index("`second`"))
        self.assertIn("an unknown GPU", text)

    def test_no_checks_are_an_error(self) -> None:
        self.assertIn("no checks-PART.csv", self.generate(code=1))


class Charts(unittest.TestCase):
    def test_logarithms_need_positive_numbers(self) -> None:
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            chart = svg.Chart("t", "x", "y", [svg.Series("s", [(1.0, bad)])])
            with self.assertRaisesRegex(ValueError, "not a pair of positive numbers"):
                svg.draw(chart)
        with self.assertRaisesRegex(ValueError, "no points"):
            svg.draw(svg.Chart("t", "x", "y"))

    def test_equal_ratios_are_equal_distances(self) -> None:
        axis = svg.Axis([1.0, 100.0], 0.0, 100.0)
        self.assertAlmostEqual(axis(10.0) - axis(1.0), axis(100.0) - axis(10.0))
        self.assertEqual(axis.ticks(), [1.0, 10.0, 100.0])

    def test_a_short_range_has_ticks_between_powers_of_ten(self) -> None:
        self.assertEqual(svg.Axis([3.0, 30.0], 0.0, 100.0).ticks(), [5.0, 10.0, 20.0])

    def test_one_point_is_a_chart(self) -> None:
        xml.fromstring(svg.draw(svg.Chart("t & u", "x", "y", [svg.Series("s", [(10.0, 10.0)], first=True)])))


class Driver(unittest.TestCase):
    def results(self, names: list[str], budget_s: float = 60.0) -> dict[str, dict]:
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        script = folder / "worker.py"
        script.write_text(ANSWERS)
        tasks = [(4, 2, name) for name in names]

        def limit(task: run.Task) -> float:
            return 0.5 if task[2] == "hangs" else 30.0

        with mock.patch.object(run, "WORKER", script):
            return {task[2]: result for task, result in run.results(tasks, "cpu", budget_s, limit)}

    def test_a_worker_that_dies_or_hangs_costs_its_own_task(self) -> None:
        got = self.results(["one", "dies", "two", "hangs", "spoils", "three"])
        self.assertEqual([name for name in got if "ms" in got[name]], ["one", "two", "spoils", "three"])
        self.assertIn("no such instruction", got["dies"]["failed"])
        self.assertEqual(got["hangs"]["failed"], "given up after 0 s")

    def test_a_spent_budget_is_named(self) -> None:
        got = self.results(["one", "two"], budget_s=-1.0)
        self.assertEqual({result["failed"] for result in got.values()}, {"not tried: the budget of -1 s was spent"})

    def test_operations_are_counted_by_the_loss(self) -> None:
        line = run.row_of((1000, 100, "e"), {"ms": 2.0, "graph_ms": 1.2, "gradient_error": 1e-3}, "samtone_query")
        self.assertEqual((line["tflops"], line["milliseconds"], line["gradient_error"]), ("1.0", "2.0000", "1.000e-03"))
        self.assertEqual(run.row_of((1000, 100, "products 9"), {"ms": 0.9}, None)["tflops"], "1.0")

    def test_shapes(self) -> None:
        self.assertEqual(run.parse_shape("8192,768"), (8192, 768))
        for bad in ("8192", "1,4", "a,b", "-3,4"):
            with self.assertRaisesRegex(Exception, "is not B,d"):
                run.parse_shape(bad)


if __name__ == "__main__":
    unittest.main()
