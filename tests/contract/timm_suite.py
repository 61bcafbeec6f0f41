"""timm's own test modules, fetched once from its source distribution and imported under names of our own."""
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import timm

CACHE = Path(__file__).parents[2] / ".cache"


def tests_folder() -> Path:
    """The `tests` folder of the installed timm's source distribution, downloaded by pip if it is not in the cache."""
    folder = CACHE / f"timm-{timm.__version__}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm",
                 "--dest", scratch, f"timm=={timm.__version__}"],
                check=True,
            )
            with tarfile.open(next(Path(scratch).glob("timm-*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            try:
                os.rename(Path(scratch) / folder.name, folder)
            except OSError:  # another test process was first
                assert folder.exists()
    return folder / "tests"


def load(name: str) -> ModuleType:
    """One of timm's test modules, not as `tests.<name>`: that package is ours."""
    spec = importlib.util.spec_from_file_location(f"timm_{name}", tests_folder() / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
