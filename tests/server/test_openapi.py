"""The served OpenAPI document says what the server does: schemathesis makes requests from it, right and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import Served, serve, stop

NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"),
    *("/v1/messages/count_tokens", "/tokenize", "/detokenize"),
)


@pytest.fixture(scope="module")
def small(model_path: str) -> Iterator[Served]:
    """A server whose answers are short, whatever is asked for."""
    found = serve(model_path, "--context", "48", "--max-n", "2")
    yield found
    stop(found)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", PATHS)
def test_no_request_from_the_document_makes_the_server_fail(small: Served, path: str, mode: str) -> None:
    import schemathesis  # here: importing it takes a second, in each process that collects tests
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    schema = schemathesis.openapi.from_dict(small.client.get("/openapi.json").json())
    schema.config.update(base_url=small.url)
    wanted = CHECKS.get_by_names(list(NAMES))
    statuses = set()

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case = data.draw(schema[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        statuses.add(case.call_and_validate(checks=wanted).status_code)

    run()
    assert statuses <= {200, 400, 404, 413, 415}


@pytest.mark.slow
def test_the_document_lists_every_endpoint(small: Served) -> None:
    paths = small.client.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == set(PATHS)
    assert {path for path, methods in paths.items() if "get" in methods} >= {"/v1/models", "/health", "/metrics"}
    assert not any("422" in operation["responses"] for methods in paths.values() for operation in methods.values())
