"""Parameters of a request that this server does not implement: ignored or refused.

The names are those of the OpenAI API and of its extensions in clients and other servers (vLLM,
llama.cpp, LM Studio, Ollama, text-generation-webui). A parameter that cannot change the answer is
ignored. A parameter that changes it is refused, unless it has its neutral value. Unknown names are
refused too, since many are misspelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from dsvl_export.serving.errors import RequestError, quoted

IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls",
    # vLLM, llama.cpp, LM Studio, Ollama, OpenRouter
    "request_id", "priority", "cache_salt", "cache_prompt", "id_slot", "timings_per_token",
    "return_progress", "ttl", "draft_model", "keep_alive", "usage", "session_id", "chat_id",
}  # fmt: skip
# Values that do not change the answer.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
    # vLLM
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "documents": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    # llama.cpp, LM Studio, text-generation-webui
    "grammar": (),
    "json_schema": (),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "do_sample": (),
    "samplers": (),
    "lora": ([],),
}


def check_unsupported(extra: Mapping[str, Any], supported: Iterable[str]) -> None:
    """Check the parameters of a request that are not implemented.

    Args:
        extra: names and values of the parameters.
        supported: names of the implemented parameters, for a suggestion.

    Raises:
        RequestError: a parameter could change the answer.
    """
    for name, value in extra.items():
        if name in IGNORED or (name in NEUTRAL and value is None):
            continue
        if any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        if name in NEUTRAL:
            raise RequestError(400, f"The parameter {name} is not supported; leave it out.", param=name)
        close = get_close_matches(name[:60], list(supported), 1, 0.75)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RequestError(
            400, f"The parameter {quoted(name)} is unknown{hint}; leave it out.",
            param=name[:80],
        )  # fmt: skip


def _same(value: Any, neutral: Any) -> bool:
    """Return whether two JSON values are equal; ``true`` is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
