"""A converted folder behind a server, asked by the openai client. Needs `pip install openai 'yonga[serve]'`."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MINI

openai = pytest.importorskip("openai", reason="pip install openai 'yonga[serve]'")
pytest.importorskip("uvicorn", reason="pip install openai 'yonga[serve]'")
SERVER = shutil.which("yonga", path=str(Path(sys.executable).parent))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER is None, reason="pip install openai 'yonga[serve]'"),
]
CHAT = [{"role": "user", "content": "What is a KV cache?"}]


@pytest.fixture(scope="module")
def client(convert: Callable[..., Path]) -> Iterator[Any]:
    """A client of a server that has loaded the bundled model, packed."""
    folder = convert(MINI, "--preset", "k6v4", "--target", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([str(SERVER), "serve", str(folder), "--port", str(port), "--device", "cpu"])
    try:
        found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(400):
            assert server.poll() is None, "the server left"
            try:
                found.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield found
    finally:
        server.terminate()
        server.wait()


def test_an_answer_whole_and_streamed(client: Any) -> None:
    (model,) = client.models.list().data
    settings = {"model": model.id, "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    assert whole.usage.completion_tokens == 12
    parts = client.chat.completions.create(**settings, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed.strip() == whole.choices[0].message.content.strip() != ""
    again = client.chat.completions.create(**settings)
    assert again.choices[0].message.content == whole.choices[0].message.content
