"""The documentation's programs run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_method_of_the_guide_passes_its_test(tmp_path):
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    files = re.findall(r"```python\n# (\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert [name for name, _ in files] == ["norm_keep.py", "test_norm_keep.py"]
    for name, code in files:
        (tmp_path / name).write_text(code)
        assert len(code.splitlines()) < 100
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
