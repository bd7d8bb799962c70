"""Coding agents and command-line clients; checked in 2026-11: Codex 0.171, opencode 1.18, Cline 3.0, llm 0.36."""

from __future__ import annotations

from cli.clients.client import Client, ConfigFile, Entry, Step

_CONTINUE_MODEL = {
    "name": "hostler",
    "provider": "openai",
    "model": "@MODEL@",
    "apiBase": "@BASE@",
    "apiKey": "@KEY@",
    "roles": ["chat", "edit", "apply"],
}

AGENTS = (
    Client(
        name="codex",
        title="Codex CLI",
        kind="agent",
        speaks="/v1/responses",
        # A profile is a file of its own, so the user's config.toml is never touched.
        files=(
            ConfigFile(
                name="hostler.config.toml",
                format="toml",
                directory="~/.codex",
                directory_variable="CODEX_HOME",
                is_whole=True,
                entries=(
                    Entry(("model",), "@MODEL@"),
                    Entry(("model_provider",), "hostler"),
                    Entry(("model_context_window",), "@CONTEXT@"),
                    Entry(("model_providers", "hostler", "name"), "hostler"),
                    Entry(("model_providers", "hostler", "base_url"), "@BASE@"),
                    Entry(("model_providers", "hostler", "wire_api"), "responses"),
                    Entry(("model_providers", "hostler", "env_key"), "HOSTLER_API_KEY", when="key"),
                ),
            ),
        ),
        key_variable="HOSTLER_API_KEY",
        steps=(Step("codex --profile hostler", is_command=True),),
    ),
    Client(
        name="claude-code",
        title="Claude Code",
        kind="agent",
        speaks="/v1/messages",
        files=(
            ConfigFile(
                name="hostler.json",
                format="json",
                directory="~/.claude",
                directory_variable="CLAUDE_CONFIG_DIR",
                is_whole=True,
                entries=(
                    Entry(("env", "ANTHROPIC_BASE_URL"), "@ROOT@"),
                    Entry(("env", "ANTHROPIC_AUTH_TOKEN"), "@KEY@"),
                    Entry(("env", "ANTHROPIC_MODEL"), "@MODEL@"),
                    Entry(("env", "ANTHROPIC_DEFAULT_HAIKU_MODEL"), "@MODEL@"),
                    Entry(("env", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"), "1"),
                ),
            ),
        ),
        steps=(Step("claude --settings ~/.claude/hostler.json", is_command=True),),
    ),
    Client(
        name="opencode",
        title="opencode",
        kind="agent",
        speaks="/v1/chat/completions",
        files=(
            ConfigFile(
                name="opencode.json",
                format="json",
                directory="~/.config/opencode",
                directory_variable="XDG_CONFIG_HOME",
                under="opencode",
                alternatives=("opencode.jsonc",),
                entries=(
                    Entry(("provider", "hostler", "npm"), "@ai-sdk/openai-compatible"),
                    Entry(("provider", "hostler", "name"), "hostler"),
                    Entry(("provider", "hostler", "options", "baseURL"), "@BASE@"),
                    Entry(("provider", "hostler", "options", "apiKey"), "{env:HOSTLER_API_KEY}", when="key"),
                    Entry(
                        ("provider", "hostler", "models", "@MODEL@"),
                        {"name": "@MODEL@", "limit": {"context": "@CONTEXT@", "output": "@CONTEXT@"}},
                    ),
                ),
            ),
        ),
        key_variable="HOSTLER_API_KEY",
        steps=(Step("opencode --model hostler/@MODEL@", is_command=True),),
    ),
    Client(
        name="aider",
        title="aider",
        kind="agent",
        speaks="/v1/chat/completions",
        files=(
            ConfigFile(
                name=".aider.conf.yml",
                format="yaml",
                directory="~",
                entries=(
                    Entry(("model",), "openai/@MODEL@", is_ours=False),
                    Entry(("openai-api-base",), "@BASE@", is_ours=False),
                    Entry(("openai-api-key",), "@KEY@", is_ours=False),
                ),
            ),
        ),
        steps=(Step("aider --no-show-model-warnings", is_command=True),),
    ),
    Client(
        name="cline",
        title="Cline",
        kind="agent",
        speaks="/v1/chat/completions",
        steps=(
            Step("In the terminal:"),
            Step("cline auth -p openai -b @BASE@ -k @KEY@ -m @MODEL@", is_command=True),
            Step(
                "In VS Code: Cline's settings (the gear), API Provider 'OpenAI Compatible', Base URL @BASE@, "
                "API Key @KEY@, Model ID @MODEL@; under Model Configuration set the context window to @CONTEXT@."
            ),
        ),
    ),
    Client(
        name="tiny-agents",
        title="tiny-agents (Hugging Face)",
        kind="agent",
        speaks="/v1/chat/completions",
        files=(
            ConfigFile(
                name="agent.json",
                format="json",
                directory="./hostler-agent",
                entries=(
                    Entry(("model",), "@MODEL@", is_ours=False),
                    Entry(("endpointUrl",), "@BASE@", is_ours=False),
                    Entry(("apiKey",), "@KEY@", is_ours=False, when="key"),
                    Entry(("servers",), [], is_ours=False),
                ),
            ),
        ),
        steps=(
            Step("Put the MCP servers that it may use under 'servers', then:"),
            Step("tiny-agents run ./hostler-agent", is_command=True),
        ),
    ),
    Client(
        name="llm",
        title="llm (Datasette)",
        kind="shell",
        speaks="/v1/chat/completions",
        files=(
            ConfigFile(
                name="extra-openai-models.yaml",
                format="yaml",
                directory="~/.config/io.datasette.llm",
                directory_variable="LLM_USER_PATH",
                mac_directory="~/Library/Application Support/io.datasette.llm",
                entries=(
                    Entry(
                        (),
                        {"model_id": "hostler/@MODEL@", "model_name": "@MODEL@", "api_base": "@BASE@"},
                        item_key="model_id",
                        when="no key",
                    ),
                    Entry(
                        (),
                        {
                            "model_id": "hostler/@MODEL@",
                            "model_name": "@MODEL@",
                            "api_base": "@BASE@",
                            "api_key_name": "hostler",
                        },
                        item_key="model_id",
                        when="key",
                    ),
                ),
            ),
        ),
        steps=(
            Step("llm keys set hostler --value @KEY@", is_command=True, when="key"),
            Step("llm -m hostler/@MODEL@ 'What is the capital of France?'", is_command=True),
        ),
    ),
    Client(
        name="continue",
        title="Continue",
        kind="editor",
        speaks="/v1/chat/completions",
        files=(
            ConfigFile(
                name="config.yaml",
                format="yaml",
                directory="~/.continue",
                directory_variable="CONTINUE_GLOBAL_DIR",
                entries=(
                    Entry(("name",), "Local", is_ours=False),
                    Entry(("version",), "1.0.0", is_ours=False),
                    Entry(("schema",), "v1", is_ours=False),
                    Entry(("models",), _CONTINUE_MODEL, item_key="name"),
                ),
            ),
        ),
        steps=(Step("In VS Code or JetBrains choose the model 'hostler'; in the terminal: cn --config FILE."),),
    ),
)
