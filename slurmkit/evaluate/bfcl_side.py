"""What runs in bfcl-eval's own environment: `python bfcl_side.py`, settings in and results out, both as JSON.

It imports nothing of ours, which is not installed there. Where the server is and its key are in OPENAI_BASE_URL and
OPENAI_API_KEY. Settings: `folder`, an empty one for bfcl-eval's files; `categories`; `limit`, entries of each, or null;
`seed`; `max_tokens` of a reply, or null; `concurrency`.
Results: of each category its `size`, and `entries` by id: {"correct": …, "error": …}, null where the request went well.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MODEL = "slurmkit"
"""What the server, bfcl-eval and its result files call the model that is asked."""
# As on the leaderboard.
_TEMPERATURE = 0.001


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Ask the server for all entries, then have bfcl-eval judge them."""
    folder = Path(settings["folder"])
    os.environ["BFCL_PROJECT_ROOT"] = str(folder)  # read when bfcl-eval is imported
    models = _register(settings)
    from bfcl_eval import _llm_response_generation as generation
    from bfcl_eval.eval_checker import eval_runner
    from bfcl_eval.utils import (
        get_directory_structure_by_category,
        get_file_name_by_category,
        load_dataset_entry,
        load_file,
    )

    wanted: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for category in settings["categories"]:
        ids = [entry["id"] for entry in load_dataset_entry(category, include_prereq=False)]
        sizes[category] = len(ids)
        if settings["limit"] is not None and settings["limit"] < len(ids):
            ids = random.Random(f"{settings['seed']} {category}").sample(ids, settings["limit"])
        wanted[category] = ids
    is_part = any(len(ids) < sizes[category] for category, ids in wanted.items())
    (folder / "test_case_ids_to_generate.json").write_text(json.dumps(wanted))
    generation.main(
        SimpleNamespace(
            model=[MODEL],
            test_category=list(wanted),
            temperature=_TEMPERATURE,
            include_input_log=False,
            exclude_state_log=True,
            num_threads=settings["concurrency"],
            result_dir="result",
            allow_overwrite=False,
            run_ids=is_part,
        )
    )
    found: dict[str, Any] = {}
    table: dict[str, Any] = {}
    handler = eval_runner.get_handler(MODEL)
    for category in wanted:
        where = Path(MODEL) / get_directory_structure_by_category(category)
        name = get_file_name_by_category(category, is_result_file=True)
        answers = load_file(folder / "result" / where / name, sort_by_id=True)
        # It changes what it is given.
        errors = {each["id"]: str(each["result"]) if "traceback" in each else None for each in answers}
        arguments = (category, folder / "result", folder / "score", answers, models[MODEL].model_name, handler, table)
        eval_runner.evaluate_task(*arguments, allow_missing=is_part)
        name = get_file_name_by_category(category, is_score_file=True)
        # A line of figures, then one for each entry that is wrong.
        wrong = {line["id"] for line in load_file(folder / "score" / where / name)[1:]}
        entries = {each: {"correct": each not in wrong, "error": error} for each, error in errors.items()}
        found[category] = {"size": sizes[category], "entries": entries}
    return found


def _register(settings: dict[str, Any]) -> dict[str, Any]:
    """Put a list of our one model in the place of bfcl-eval's, which imports the library of every vendor there is."""
    listed: Any = ModuleType("bfcl_eval.constants.model_config")
    models: dict[str, Any] = {}
    listed.MODEL_CONFIG_MAPPING = models
    sys.modules[listed.__name__] = listed
    from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

    own = {"seed": settings["seed"]}
    if settings["max_tokens"] is not None:
        own["max_completion_tokens"] = settings["max_tokens"]

    class Handler(OpenAICompletionsHandler):  # type: ignore[misc] # it is not installed here
        """OpenAI's chat completions with tools, as vLLM serves them."""

        def generate_with_backoff(self, **asked: Any) -> Any:
            asked.pop("store")  # OpenAI's alone
            return super().generate_with_backoff(**asked, **own)

        def _parse_query_response_FC(self, api_response: Any) -> Any:  # bfcl-eval's
            found = super()._parse_query_response_FC(api_response)
            self._add_reasoning_content_if_available_FC(api_response, found)
            return found

    models[MODEL] = SimpleNamespace(
        model_name=MODEL,
        display_name=MODEL,
        model_handler=Handler,
        is_fc_model=True,
        underscore_to_dot=True,  # names of tools have no dots over OpenAI's API
        input_price=None,
        output_price=None,
    )
    return models


if __name__ == "__main__":
    results, sys.stdout = sys.stdout, sys.stderr
    json.dump(run(json.load(sys.stdin)), results)
