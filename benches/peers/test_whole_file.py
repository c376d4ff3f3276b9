"""The helpers that write results."""

import pathlib
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import whole_file


class WholeFile(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def test_a_failure_leaves_what_was_there(self):
        path = self.folder / "step.csv"
        whole_file.write(path, "old\n")
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")), self.assertRaises(OSError):
            whole_file.write(path, "new and longer\n")
        self.assertEqual(path.read_text(), "old\n")
        self.assertEqual([p.name for p in self.folder.iterdir()], ["step.csv"])
        whole_file.write(path, "new\n")
        self.assertEqual(path.read_text(), "new\n")

    @unittest.skipUnless(sys.platform == "linux", "as root, only /proc takes no files")
    def test_a_folder_that_takes_no_files_ends_the_program(self):
        with self.assertRaises(SystemExit) as ended:
            whole_file.writable(pathlib.Path("/proc"))
        self.assertIn("cannot write into the folder /proc: ", str(ended.exception))
        whole_file.writable(self.folder / "a" / "b")
        self.assertEqual(list((self.folder / "a" / "b").iterdir()), [])

    def test_a_reader_that_leaves_ends_nothing(self):
        program = "import whole_file\nfor k in range(20000): whole_file.say(k)\nopen('done', 'w').close()\n"
        path = [sys.executable, "-c", f"import sys; sys.path.append({str(pathlib.Path(__file__).parent)!r})\n{program}"]
        with subprocess.Popen(path, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.readline()
            process.stdout.close()
            self.assertEqual(process.stderr.read(), b"")
        self.assertEqual(process.returncode, 0)
        self.assertTrue((self.folder / "done").exists())


if __name__ == "__main__":
    unittest.main()
