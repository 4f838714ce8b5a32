"""ovtq: shrinks the KV cache of stateful OpenVINO language models by rewriting their graph."""

from pathlib import Path

__version__ = "0.1.0"

# A checkout keeps passes/ and models/ beside ovtq/; a wheel carries them inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
