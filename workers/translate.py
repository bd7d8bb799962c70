"""Between the wire and the engine: contract messages to dataclasses and back. Pure; knows the stubs, no engine."""

from __future__ import annotations

import json
from typing import Any

from hostler.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2 as life

from workers.engine import (
    QUANTIZED_KINDS,
    AdapterSource,
    ChatPrompt,
    Constraint,
    EngineStats,
    Event,
    Finish,
    GenerationRequest,
    ImageInput,
    LoadSpec,
    ModelFacts,
    Progress,
    Prompt,
    PromptLogprobs,
    ReasoningDelta,
    ReasoningRule,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolSpec,
    ToolUse,
)

_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_DEVELOPER: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH, "tool_calls": pb.FINISH_REASON_TOOL_CALLS}
_ENGINES = {
    "text": life.ENGINE_KIND_TEXT,
    "scripted": life.ENGINE_KIND_SCRIPTED,
    "embedding": life.ENGINE_KIND_EMBEDDING,
    "rerank": life.ENGINE_KIND_RERANK,
    "transcription": life.ENGINE_KIND_TRANSCRIPTION,
    "speech": life.ENGINE_KIND_SPEECH,
}


def generation_request(message: pb.GenerateRequest, facts: ModelFacts, request_id: str) -> GenerationRequest:
    """Return the engine's form of a request.

    Raises:
        UnsupportedParameter: it asks for what this model cannot honour.
        ModelNotFound: it asks for an adapter that is not here.
        InvalidRequest: malformed.
    """
    if message.adapter and message.adapter not in facts.adapters:
        raise ModelNotFound(f"Adapter {message.adapter[:100]!r} is not served beside this model.", param="model")
    _refuse_unsupported(message, facts)
    return GenerationRequest(
        prompt=_prompt(message),
        request_id=request_id,
        sampling=_sampling(message.sampling),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stop=tuple(s for s in message.stop if s),
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
        constraint=_constraint(message.constraint),
        tool_use=_tool_use(message.chat),
        reasoning=_reasoning(message.chat.reasoning),
        cache_scope=message.cache_scope,
        adapter=message.adapter,
        batch=message.batch,
        echo_logprobs=message.echo_logprobs,
        wants_progress=message.wants_progress,
    )


def _constraint(message: pb.Constraint) -> Constraint | None:
    kind = message.WhichOneof("kind")
    if kind is None or (kind == "json_object" and not message.json_object):
        return None
    if kind == "json_object":
        return Constraint("json_object")
    return Constraint("lark" if kind == "grammar" else kind, str(getattr(message, kind)))


def _tool_use(chat: pb.Chat) -> ToolUse:
    """Return which tools may be called: of those in the prompt, the allowed ones."""
    choice = chat.tool_choice
    if choice.mode == pb.TOOL_CHOICE_MODE_NONE:
        return ToolUse()
    allowed = set(choice.allowed_names)
    tools = tuple(ToolSpec(t.name, _parameters(t), t.strict) for t in chat.tools if not allowed or t.name in allowed)
    required = choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED
    if required and not tools:
        raise InvalidRequest("A tool call is demanded, but no tool may be called.", param="tool_choice")
    return ToolUse(tools, required, not choice.HasField("parallel") or choice.parallel)


def _reasoning(message: pb.Reasoning) -> ReasoningRule:
    return ReasoningRule(
        message.enabled if message.HasField("enabled") else None,
        message.budget_tokens if message.HasField("budget_tokens") else None,
    )


def _refuse_unsupported(message: pb.GenerateRequest, facts: ModelFacts) -> None:
    refused = None
    if message.constraint.WhichOneof("kind") and facts.engine != "text":
        refused = ("response_format", "This model has no structured output.")
    elif message.suffix and not (facts.supports_fill_in_middle and message.WhichOneof("prompt") == "text"):
        refused = ("suffix", "This model has no tokens for filling a gap between a text and a suffix.")
    elif message.echo_logprobs and facts.engine != "text":
        refused = ("echo", "This model has no logprobs of its prompt.")
    elif message.WhichOneof("prompt") == "chat":
        chat = message.chat
        kinds = {str(part.WhichOneof("part")) for m in chat.messages for part in m.parts} - {"text", "None"}
        if facts.supports_images:
            kinds.discard("image")
        if kinds:
            refused = ("messages", f"{' and '.join(sorted(kinds)).capitalize()} input is not supported by this model.")
        elif chat.tools and chat.tool_choice.mode != pb.TOOL_CHOICE_MODE_NONE and not facts.supports_tools:
            refused = ("tools", "This model does not call tools.")
    if refused is not None:
        raise UnsupportedParameter(refused[1], param=refused[0])


def _prompt(message: pb.GenerateRequest) -> Prompt:
    kind = message.WhichOneof("prompt")
    if kind == "chat":
        return chat_prompt(message.chat)
    if kind == "text":
        return TextPrompt(message.text, message.suffix)
    if kind == "token_ids":
        return TokenPrompt(tuple(message.token_ids.ids))
    raise InvalidRequest("The request has no prompt.", param="messages")


def chat_prompt(chat: pb.Chat) -> ChatPrompt:
    """Return the form that chat templates take."""
    if not chat.messages:
        raise InvalidRequest("messages must hold at least one message.", param="messages")
    kwargs: dict[str, Any] = {}
    if chat.template_kwargs_json:
        try:
            kwargs = json.loads(chat.template_kwargs_json)
        except ValueError:
            raise InvalidRequest("chat_template_kwargs is not valid JSON.", param="chat_template_kwargs") from None
        if not isinstance(kwargs, dict):
            raise InvalidRequest("chat_template_kwargs must be an object.", param="chat_template_kwargs")
    if chat.reasoning.HasField("enabled"):
        # Two names for one thing: the first in most families, the second in DeepSeek's and Granite's.
        kwargs.setdefault("enable_thinking", chat.reasoning.enabled)
        kwargs.setdefault("thinking", chat.reasoning.enabled)
    if chat.reasoning.effort:
        kwargs.setdefault("reasoning_effort", chat.reasoning.effort)
    for reserved in (
        "messages",
        "tools",
        "tokenize",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
    ):
        kwargs.pop(reserved, None)
    return ChatPrompt(
        messages=[_message(m) for m in chat.messages],
        tools=[_tool(t) for t in chat.tools] if chat.tool_choice.mode != pb.TOOL_CHOICE_MODE_NONE else (),
        template_kwargs=kwargs,
        continue_final_message=chat.continue_final_message,
        images=[
            ImageInput(part.image.data, part.image.detail)
            for message in chat.messages
            for part in message.parts
            if part.HasField("image")
        ],
    )


def _message(message: pb.Message) -> dict[str, object]:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest("A message has no role.", param="messages")
    out: dict[str, object] = {"role": role, "content": _content(message)}
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _arguments(c.arguments_json)}}
            for c in message.tool_calls
        ]
    for key in ("tool_call_id", "name"):
        if value := getattr(message, key):
            out[key] = value
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    return out


def _content(message: pb.Message) -> object:
    """Text where there is only text, which every template takes; else a list of parts."""
    if not any(part.HasField("image") for part in message.parts):
        return "".join(part.text for part in message.parts)
    return [
        {"type": "image"} if part.HasField("image") else {"type": "text", "text": part.text} for part in message.parts
    ]


def _arguments(text: str) -> object:
    """Templates want an object where the text is one."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


def _tool(tool: pb.Tool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name, "description": tool.description}
    if tool.parameters_json:
        function["parameters"] = _parameters(tool)
    return {"type": "function", "function": function}


def _parameters(tool: pb.Tool) -> dict[str, object]:
    try:
        parameters = json.loads(tool.parameters_json or "{}")
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"The parameters of tool {tool.name[:64]!r} are not a JSON object.", param="tools")
    return parameters


def _sampling(message: pb.Sampling) -> SamplingParams:
    def maybe(name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]

    repetition = maybe("repetition_penalty")
    return SamplingParams(
        temperature=maybe("temperature"),
        top_p=maybe("top_p"),
        top_k=maybe("top_k"),
        min_p=maybe("min_p"),
        seed=maybe("seed"),
        frequency_penalty=maybe("frequency_penalty") or 0.0,
        presence_penalty=maybe("presence_penalty") or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        logit_bias=dict(message.logit_bias),
        ignore_eos=message.ignore_eos,
    )


def event(value: Event) -> pb.GenerateResponse:
    """Return the wire's form of an engine event."""
    if isinstance(value, TextDelta):
        return pb.GenerateResponse(text=pb.TextDelta(text=value.text, logprobs=[_logprob(x) for x in value.logprobs]))
    if isinstance(value, Progress):
        return pb.GenerateResponse(
            progress=pb.Progress(
                num_prompt_tokens=value.num_prompt_tokens, num_prefilled_tokens=value.num_prefilled_tokens
            )
        )
    if isinstance(value, PromptLogprobs):
        return pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=[_logprob(x) for x in value.tokens]))
    if isinstance(value, ReasoningDelta):
        return pb.GenerateResponse(reasoning=pb.ReasoningDelta(text=value.text))
    if isinstance(value, ToolCallStart):
        start = pb.ToolCallStart(index=value.index, id=value.id, name=value.name)
        return pb.GenerateResponse(tool_call_start=start)
    if isinstance(value, ToolCallArguments):
        part = pb.ToolCallArguments(index=value.index, json_fragment=value.json_fragment)
        return pb.GenerateResponse(tool_call_arguments=part)
    if isinstance(value, ToolCallEnd):
        return pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=value.index))
    return pb.GenerateResponse(finish=_finish(value))


def _logprob(value: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=value.token_id, token=value.token, logprob=value.logprob, top=[_logprob(x) for x in value.top]
    )


def _finish(value: Finish) -> pb.Finish:
    return pb.Finish(
        reason=_FINISH[value.reason],
        usage=pb.Usage(
            num_prompt_tokens=value.num_prompt_tokens,
            num_cached_tokens=value.num_cached_tokens,
            num_completion_tokens=value.num_completion_tokens,
            num_reasoning_tokens=value.num_reasoning_tokens,
        ),
        timing=pb.Timing(
            queue_us=max(0, value.queue_us), prefill_us=max(0, value.prefill_us), decode_us=max(0, value.decode_us)
        ),
        stop=value.stop,
    )


def load_spec(message: life.LoadRequest) -> LoadSpec:
    """Return the engine's form of a load request.

    Raises:
        UnsupportedParameter: it asks for weights of a kind that no engine has.
    """
    if message.quantize not in QUANTIZED_KINDS:
        raise UnsupportedParameter(
            f"Weights cannot be quantized to {message.quantize[:20]!r}; {' and '.join(sorted(QUANTIZED_KINDS - {''}))} "
            "are possible.",
            param="quantize",
        )
    return LoadSpec(
        model=message.model,
        path=message.path,
        devices=tuple(message.devices) or ("cpu",),
        dtype=message.dtype or "auto",
        max_context_tokens=message.max_context_tokens,
        max_running=message.max_running or 16,
        max_queued=message.max_queued,
        kv_cache_bytes=message.kv_cache_bytes,
        prefill_chunk_tokens=message.prefill_chunk_tokens or 768,
        num_threads=message.num_threads,
        quantize=message.quantize,
        trust_remote_code=message.trust_remote_code,
        adapters=tuple(AdapterSource(adapter.name, adapter.path) for adapter in message.adapters),
        beams=message.beams or 1,
        shelf=message.shelf,
    )


def model_info(facts: ModelFacts) -> life.ModelInfo:
    """Return the wire's form of what a model is."""
    return life.ModelInfo(
        model=facts.model,
        engine=_ENGINES[facts.engine],
        architecture=facts.architecture,
        dtype=facts.dtype,
        max_context_tokens=facts.max_context_tokens,
        vocab_size=facts.vocab_size,
        num_parameters=facts.num_parameters,
        weight_bytes=facts.weight_bytes,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        supports_tools=facts.supports_tools,
        supports_reasoning=facts.supports_reasoning,
        supports_images=facts.supports_images,
        supports_audio=facts.supports_audio,
        supports_fill_in_middle=facts.supports_fill_in_middle,
        embedding_dimensions=facts.embedding_dimensions,
        voices=facts.voices,
        loads_lighter=facts.loads_lighter,
    )


def fill_stats(message: life.WatchResponse, stats: EngineStats) -> None:
    """Copy an engine's counters into a watch message."""
    message.num_steps = stats.num_steps
    message.num_running = stats.num_running
    message.num_queued = stats.num_queued
    message.max_running = stats.max_running
    message.kv_used_bytes = stats.kv_used_bytes
    message.kv_allocated_bytes = stats.kv_allocated_bytes
    message.kv_reserved_bytes = stats.kv_reserved_bytes
    message.num_prompt_tokens_total = stats.num_prompt_tokens_total
    message.num_completion_tokens_total = stats.num_completion_tokens_total
