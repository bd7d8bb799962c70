"""Desktop and web applications, editors that are set up by clicking. Checked in 2026-11 against their own manuals."""

from __future__ import annotations

from cli.clients.client import Client, ConfigFile, Entry, Snippet, Step

APPS = (
    Client(
        name="jan",
        title="Jan",
        kind="app",
        speaks="/v1/chat/completions",
        steps=(
            Step("Settings, Model Providers, Add Provider; name it 'hostler'."),
            Step("API Key: @KEY@"),
            Step("Base URL: @BASE@"),
            Step("Under Models press refresh, or add @MODEL@ by hand; then choose it in a new chat."),
        ),
    ),
    Client(
        name="open-webui",
        title="Open WebUI",
        kind="app",
        speaks="/v1/chat/completions",
        snippet=Snippet(
            "sh",
            "docker run -d --name open-webui --network=host -v open-webui:/app/backend/data \\\n"
            "  -e PORT=3000 -e OPENAI_API_BASE_URL=@BASE@ -e OPENAI_API_KEY=@KEY@ \\\n"
            "  ghcr.io/open-webui/open-webui:main",
        ),
        steps=(
            Step("Then open http://localhost:3000 and choose @MODEL@."),
            Step(
                "One that runs already: Admin Panel, Settings, Connections, OpenAI API, +; URL @BASE@, key @KEY@. "
                "From a container without --network=host the server must listen beyond loopback, with a key."
            ),
            Step(
                "Speech, if the server has models for it: Admin Panel, Settings, Audio; both engines 'OpenAI', URL "
                "@BASE@, key @KEY@; a model such as whisper-base hears, one such as piper-joe speaks."
            ),
        ),
    ),
    Client(
        name="cursor",
        title="Cursor",
        kind="editor",
        speaks="/v1/chat/completions",
        needs_public_url=True,
        steps=(
            Step("Cursor Settings, Models, API Keys: OpenAI API Key @KEY@"),
            Step("Switch on 'Override OpenAI Base URL': @BASE@"),
            Step("Models, Add Custom Model: @MODEL@; switch it on, and choose it in the chat."),
            Step("While the override is on, Cursor's own OpenAI models go to this server, too."),
        ),
    ),
    Client(
        name="zed",
        title="Zed",
        kind="editor",
        speaks="/v1/chat/completions",
        files=(
            ConfigFile(
                name="settings.json",
                format="json",
                directory="~/.config/zed",
                directory_variable="XDG_CONFIG_HOME",
                under="zed",
                mac_directory="~/.config/zed",
                entries=(
                    Entry(("language_models", "openai_compatible", "hostler", "api_url"), "@BASE@"),
                    Entry(
                        ("language_models", "openai_compatible", "hostler", "available_models"),
                        {
                            "name": "@MODEL@",
                            "display_name": "@MODEL@",
                            "max_tokens": "@CONTEXT@",
                            "max_output_tokens": "@OUTPUT@",
                            "capabilities": {
                                "tools": True,
                                "images": False,
                                "parallel_tool_calls": False,
                                "prompt_cache_key": False,
                            },
                        },
                        item_key="name",
                    ),
                ),
            ),
        ),
        key_variable="HOSTLER_API_KEY",
        steps=(
            Step(
                "Zed wants a key even if the server does not: start it with HOSTLER_API_KEY set to any word, or enter "
                "one under Agent Settings, LLM Providers, hostler.",
                when="no key",
            ),
            Step("Choose @MODEL@ in the agent panel."),
        ),
    ),
)
