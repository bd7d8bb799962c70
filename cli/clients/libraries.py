"""Libraries: a program that asks and prints the answer, complete. Each is run against a server by a test."""

from __future__ import annotations

from cli.clients.client import Client, Snippet, Step

_QUESTION = "What is the capital of France?"

LIBRARIES = (
    Client(
        name="curl",
        title="curl",
        kind="shell",
        speaks="/v1/chat/completions",
        snippet=Snippet(
            "sh",
            "curl @BASE@/chat/completions \\\n"
            "  -H 'Content-Type: application/json' -H 'Authorization: Bearer @KEY@' \\\n"
            '  -d \'{"model": "@MODEL@", "messages": [{"role": "user", "content": "' + _QUESTION + "\"}]}'",
        ),
    ),
    Client(
        name="openai-python",
        title="OpenAI SDK for Python",
        kind="library",
        speaks="/v1/chat/completions, /v1/responses",
        snippet=Snippet(
            "python",
            "from openai import OpenAI\n\n"
            'client = OpenAI(base_url="@BASE@", api_key="@KEY@")\n'
            "reply = client.chat.completions.create(\n"
            f'    model="@MODEL@", messages=[{{"role": "user", "content": "{_QUESTION}"}}]\n'
            ")\n"
            "print(reply.choices[0].message.content)",
        ),
        steps=(Step("pip install openai", is_command=True),),
    ),
    Client(
        name="openai-node",
        title="OpenAI SDK for Node",
        kind="library",
        speaks="/v1/chat/completions, /v1/responses",
        snippet=Snippet(
            "js",
            'import OpenAI from "openai";\n\n'
            'const client = new OpenAI({ baseURL: "@BASE@", apiKey: "@KEY@" });\n'
            "const reply = await client.chat.completions.create({\n"
            '  model: "@MODEL@",\n'
            f'  messages: [{{ role: "user", content: "{_QUESTION}" }}],\n'
            "});\n"
            "console.log(reply.choices[0].message.content);",
        ),
        steps=(Step("npm install openai", is_command=True),),
    ),
    Client(
        name="ai-sdk",
        title="AI SDK (Vercel)",
        kind="library",
        speaks="/v1/chat/completions",
        snippet=Snippet(
            "js",
            'import { createOpenAICompatible } from "@ai-sdk/openai-compatible";\n'
            'import { generateText } from "ai";\n\n'
            'const hostler = createOpenAICompatible({ name: "hostler", baseURL: "@BASE@", apiKey: "@KEY@" });\n'
            f'const {{ text }} = await generateText({{ model: hostler("@MODEL@"), prompt: "{_QUESTION}" }});\n'
            "console.log(text);",
        ),
        steps=(Step("npm install ai @ai-sdk/openai-compatible", is_command=True),),
    ),
    Client(
        name="langchain",
        title="LangChain",
        kind="library",
        speaks="/v1/chat/completions",
        snippet=Snippet(
            "python",
            "from langchain_openai import ChatOpenAI\n\n"
            'model = ChatOpenAI(base_url="@BASE@", api_key="@KEY@", model="@MODEL@")\n'
            f'print(model.invoke("{_QUESTION}").content)',
        ),
        steps=(Step("pip install langchain-openai", is_command=True),),
    ),
    Client(
        name="pydantic-ai",
        title="Pydantic AI",
        kind="library",
        speaks="/v1/chat/completions",
        snippet=Snippet(
            "python",
            "from pydantic_ai import Agent\n"
            "from pydantic_ai.models.openai import OpenAIChatModel\n"
            "from pydantic_ai.providers.openai import OpenAIProvider\n\n"
            'provider = OpenAIProvider(base_url="@BASE@", api_key="@KEY@")\n'
            'agent = Agent(OpenAIChatModel("@MODEL@", provider=provider))\n'
            f'print(agent.run_sync("{_QUESTION}").output)',
        ),
        steps=(Step("pip install 'pydantic-ai-slim[openai]'", is_command=True),),
    ),
    Client(
        name="huggingface-hub",
        title="Hugging Face InferenceClient",
        kind="library",
        speaks="/v1/chat/completions",
        snippet=Snippet(
            "python",
            "from huggingface_hub import InferenceClient\n\n"
            'client = InferenceClient(base_url="@BASE@", api_key="@KEY@")\n'
            "reply = client.chat.completions.create(\n"
            f'    model="@MODEL@", messages=[{{"role": "user", "content": "{_QUESTION}"}}]\n'
            ")\n"
            "print(reply.choices[0].message.content)",
        ),
        steps=(Step("pip install huggingface_hub", is_command=True),),
    ),
    Client(
        name="transformers",
        title="transformers chat",
        kind="shell",
        speaks="/v1/chat/completions, /load_model",
        steps=(Step("transformers chat @MODEL@ @ROOT@", is_command=True),),
    ),
)
