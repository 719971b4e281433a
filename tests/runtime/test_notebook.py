"""forge in a real kernel of Jupyter: what cells show, what the notebook keeps, and what it does not keep alive."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the kernel's client
]
TESTS = Path(__file__).parents[1]
CELLS = f"""
import gc, signal, sys
import forge
from forge.models import Decoder
from forge.runtime import process
PATH = {str(TESTS / "data/arch/llama/model.gguf")!r}
def decoders():
    return sum(isinstance(one, Decoder) for one in gc.get_objects())
---
forge.plan_memory(PATH, device="cpu", context=64)
---
forge.load(PATH, device="cpu", context=64)
---
llm = _
llm.generate([1, 2, 3], max_tokens=3, ignore_eos=True)
---
for chunk in llm.stream([1, 2, 3], max_tokens=20, ignore_eos=True):
    print(chunk.text, end="")
---
# raises
llm.generate([10**9])
---
forge.load(PATH, device="cpu", context=64, progress=False).notes
---
gc.collect()
gc.disable()
llm.close()
assert isinstance(sys.last_value, forge.ParameterError)
print(decoders(), sum(isinstance(one, forge.LLM) for one in Out.values()))
---
# raises
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.005)
while True:
    forge.load(PATH, device="cpu", context=64, progress=False).close()
---
process.wait_for_closed()
assert isinstance(sys.last_value, KeyboardInterrupt)
print(decoders())
forge.load(PATH, device="cpu", context=64, progress=False).generate([1, 2, 3], max_tokens=3, ignore_eos=True).ids
"""


def outputs_of(cells: str) -> list[list[Any]]:
    sources = cells.strip().split("\n---\n")
    tags = [{"tags": ["raises-exception"]} if source.startswith("# raises") else {} for source in sources]
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(source, metadata=metadata) for source, metadata in zip(sources, tags, strict=True)
        ]
    )
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_notebook_shows_what_there_is_and_keeps_no_model_alive() -> None:
    _, plan, load, completion, stream, refused, second, closed, interrupted, again = outputs_of(CELLS)
    assert [list(one.data) for one in plan] == [["text/plain", "text/html"]]
    assert "model.gguf fits cpu (" in plan[0].data["text/html"]
    line, shown = load  # the line of progress is empty at the end
    assert (line.output_type, line.data) == ("display_data", {"text/plain": ""})
    assert "<td" in shown.data["text/html"]
    assert re.search(r">llama, \d layers, width 64<", shown.data["text/html"])
    (found,) = completion
    assert "3 prompt tokens · 3 generated · ended by length" in found.data["text/html"]
    text = "".join(one.text for one in stream)
    assert [one.name for one in stream] == ["stdout"] * len(stream)
    assert len(text) >= 10
    assert refused[0].ename == "ParameterError"
    assert "this process has loaded model.gguf (0.01 GB), which LLM.close() gives back" in second[0].data["text/plain"]
    assert closed[0].text == "0 1\n"
    assert interrupted[0].ename == "KeyboardInterrupt"
    assert again[0].text == "0\n"
    assert again[1].data["text/plain"].startswith("[")
