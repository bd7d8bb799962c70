"""The `hostler` command: names, flags and help of every command, nothing else.

Each command imports its own file when it runs, so that `hostler --help` and shell completion stay fast. Below
stand `cli.serve`, `cli.chat` and `cli.control`; above, the shell.
"""

from __future__ import annotations

import time

_BEGAN = time.time()

from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from cli import client_commands, logs_command, remote_commands  # noqa: E402
from cli.exits import friendly  # noqa: E402
from cli.flags import Json, Model, ModelsDir, Port  # noqa: E402
from cli.flags import complete_model as _complete_model  # noqa: E402
from cli.flags import examples as _examples  # noqa: E402
from cli.key_commands import app as key_app  # noqa: E402
from cli.mcp_commands import app as mcp_app  # noqa: E402
from cli.service_commands import app as service_app  # noqa: E402

app = typer.Typer(
    name="hostler",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One OpenAI-compatible endpoint for every Hugging Face model on your machine.\n\n"
    "`hostler serve` starts a server; the other commands talk to the one that runs here.",
    epilog=_examples(
        "hostler serve                               one small chat model on port 8000",
        "hostler serve Qwen/Qwen3-0.6B ./my-model    from the Hub, from a directory",
        "hostler chat                                talk to it",
        "hostler ps --watch                          devices, models, tokens/s",
        "hostler --install-completion                completion for your shell",
    ),
)

app.add_typer(key_app, name="key")
app.add_typer(mcp_app, name="mcp")
app.add_typer(service_app, name="service")


@app.command(
    epilog=_examples(
        "hostler serve",
        "hostler serve Qwen/Qwen3-0.6B --port 9000",
        "hostler serve ./my-model ~/models/tiny.gguf",
        "hostler serve --config hostler.yaml --json-logs",
        'hostler serve --host 0.0.0.0 --api-key "$(openssl rand -hex 32)"',
        "hostler serve --ngrok --api-key $KEY                  reached from everywhere, through ngrok",
        "hostler serve --public --public-url https://llm.example.org --api-key $KEY",
        "hostler serve --device cpu0=2GiB --device cpu1=2GiB    two virtual devices",
    )
)
@friendly
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Loaded at start: catalog name, Hub id (org/name, org/name@revision), directory, .gguf or .onnx file.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", min=1, max=65535, help="Default 8000.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; better in $HOSTLER_API_KEY, which ps does not show.")
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origin allowed from browsers, or '*'; repeatable.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Host header to accept beyond loopback names; repeatable.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Default ./hostler.yaml, then ~/.config/hostler/hostler.yaml, if there."),
    ] = None,
    gateways: Annotated[int | None, typer.Option(min=0, max=64, help="HTTP processes; default by cores.")] = None,
    models_dir: ModelsDir = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Use only this device: ID or ID=SIZE, e.g. cuda:0 or cpu=8GiB; repeatable.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Listen on a second port for a proxy or tunnel: models only, key demanded.")
    ] = False,
    public_url: Annotated[str | None, typer.Option(help="Where others reach that port; it is tested at start.")] = None,
    public_host: Annotated[
        list[str] | None, typer.Option(help="Further Host header to accept there; repeatable.")
    ] = None,
    public_port: Annotated[int | None, typer.Option(min=1, max=65535, help="That port; default --port + 1.")] = None,
    ngrok: Annotated[bool, typer.Option("--ngrok", help="--public through a tunnel; $NGROK_AUTHTOKEN.")] = False,
    domain: Annotated[str | None, typer.Option(help="The tunnel's name; default what ngrok gives.")] = None,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="One JSON object a line instead of text.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of all processes, too.")] = False,
) -> None:
    """Start a server and show how far it is. Ctrl-C lets running requests finish, a second one does not."""
    from cli.serve import serve as run
    from cli.settings import Flags

    flags = Flags(
        models=tuple(models or ()),
        host=host,
        port=port,
        api_key=api_key,
        cors=tuple(cors or ()),
        allowed_hosts=tuple(allowed_host or ()),
        config=config,
        gateways=gateways,
        models_dir=models_dir,
        devices=tuple(device or ()),
        ray_address=ray_address,
        public=public,
        public_host=tuple(public_host or ()),
        public_port=public_port,
        public_url=public_url,
        ngrok=ngrok,
        domain=domain,
    )
    run(flags, as_json=json_logs, verbose=verbose, started_at=_BEGAN)


@app.command(
    epilog=_examples(
        "hostler chat",
        'hostler chat SmolLM2-135M-Instruct --system "Answer in one word." --temperature 0',
        'echo "What is the capital of France?" | hostler chat',
        "hostler chat --url http://gpu-box:8000 --api-key $KEY",
    )
)
@friendly
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Default: the server's first model.", autocompletion=_complete_model)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Length limit of a reply.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of the one that runs here.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key; default $HOSTLER_API_KEY.")] = None,
    port: Port = None,
) -> None:
    """Talk to a model in the terminal; in a pipe, ask one question and print the plain answer."""
    from cli import chat as talk
    from cli.chat_http import Settings

    client = talk.connect(url, api_key, port)
    try:
        settings = Settings(talk.choose_model(client, model), temperature, max_tokens, system)
        talk.run(client, settings)
    finally:
        client.close()


@app.command(epilog=_examples("hostler ps", "hostler ps --watch", "hostler ps --json | jq '.replicas[].model'"))
@friendly
def ps(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing; Ctrl-C ends it.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 1.0,
    port: Port = None,
) -> None:
    """Show devices and models: memory, requests, tokens/s, and why each model is where it is."""
    from cli import seeing

    seeing.ps(port, as_json, watch, interval)


@app.command(epilog=_examples("hostler models", "hostler models --json | jq -r '.stored[].name'"))
@friendly
def models(as_json: Json = False, models_dir: ModelsDir = None, port: Port = None) -> None:
    """List the models that the server serves and those on disk."""
    from cli import control

    control.models(port, as_json, models_dir)


@app.command(
    epilog=_examples(
        "hostler pull SmolLM2-135M-Instruct", "hostler pull Qwen/Qwen3-0.6B --revision main", "hostler pull ./tiny.gguf"
    )
)
@friendly
def pull(
    name: Annotated[str, typer.Argument(help="Catalog name, Hub id, .gguf or .onnx file.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    models_dir: ModelsDir = None,
    as_json: Json = False,
) -> None:
    """Fetch a model to disk, verified; needs no server. An interrupted pull goes on where it was."""
    from cli import control

    control.pull(name, revision, models_dir, as_json)


@app.command(epilog=_examples("hostler load Qwen3-0.6B", "hostler load Qwen3-0.6B --json"))
@friendly
def load(model: Model, as_json: Json = False, port: Port = None) -> None:
    """Bring a model up now and follow its progress."""
    from cli import control

    control.load(port, model, as_json)


@app.command(epilog=_examples("hostler unload Qwen3-0.6B"))
@friendly
def unload(model: Model, as_json: Json = False, port: Port = None) -> None:
    """Let a model's requests finish, then free its memory."""
    from cli import control

    control.unload(port, model, as_json)


@app.command(epilog=_examples("hostler sleep Qwen3-0.6B"))
@friendly
def sleep(model: Model, as_json: Json = False, port: Port = None) -> None:
    """Let a model's requests finish, then take it off its device; its next request wakes it, quicker than a load."""
    from cli import control

    control.sleep(port, model, as_json)


@app.command(epilog=_examples("hostler plan Qwen3-0.6B", "hostler plan Qwen3-0.6B --json"))
@friendly
def plan(model: Model, as_json: Json = False, port: Port = None) -> None:
    """Say where a model would go, who would give way and how long it would take, without doing it.

    Fails (exit code 1) if it cannot be brought up now, and says what would help.
    """
    from cli import seeing

    seeing.plan(port, model, as_json)


@app.command(epilog=_examples("hostler pin Qwen3-0.6B"))
@friendly
def pin(model: Model, as_json: Json = False, port: Port = None) -> None:
    """Keep a model from being evicted for another."""
    from cli import control

    control.pin(port, model, True, as_json)


@app.command(epilog=_examples("hostler unpin Qwen3-0.6B"))
@friendly
def unpin(model: Model, as_json: Json = False, port: Port = None) -> None:
    """Let a pinned model be evicted again."""
    from cli import control

    control.pin(port, model, False, as_json)


@app.command(
    epilog=_examples(
        "hostler events                 what happened, and why",
        "hostler events --follow        as it happens, too",
        "hostler events --last 1000 --json | jq 'select(.kind == \"evicted\")'",
    )
)
@friendly
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones; Ctrl-C ends it.")] = False,
    last: Annotated[int, typer.Option("--last", "-n", min=1, max=100_000, help="So many past events at most.")] = 50,
    as_json: Json = False,
    port: Port = None,
) -> None:
    """Show what happened to models and devices, and why: loads, evictions, failures, memory of other programs."""
    from cli import seeing

    seeing.events(port, last, follow, as_json)


@app.command(epilog=_examples("hostler rm SmolLM2-135M-Instruct", "hostler rm SmolLM2-135M-Instruct --yes"))
@friendly
def rm(
    name: Annotated[str, typer.Argument(help="Name of a model on disk (hostler models lists them).")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models_dir: ModelsDir = None,
    as_json: Json = False,
) -> None:
    """Delete a model from disk."""
    from cli import control

    control.remove(name, models_dir, as_json, yes)


@app.command(
    epilog=_examples(
        "hostler config                                   check the file, show every value",
        "hostler config --schema > hostler.schema.json    for your editor",
    )
)
@friendly
def config(
    file: Annotated[Path | None, typer.Option("--config", "-c", help="File to read instead of the usual one.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of hostler.yaml.")] = False,
) -> None:
    """Check hostler.yaml and print the configuration that `hostler serve` would use, or its JSON schema."""
    import json

    from hostler.config import HostlerConfig

    from cli import settings

    if schema:
        typer.echo(json.dumps(HostlerConfig.model_json_schema(), indent=2))
        return
    resolved, path = settings.resolve(settings.Flags(config=file))
    values = settings.without_secrets(resolved.model_dump(mode="json"))
    typer.echo(f"# from {path or 'defaults and the environment'}")
    typer.echo(settings.as_yaml(values), nl=False)


@app.command(
    epilog=_examples(
        "hostler reload --dry-run    check the file, say what would change",
        "hostler reload              change it",
    )
)
@friendly
def reload(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would change.")] = False,
    as_json: Json = False,
    port: Port = None,
) -> None:
    """Have the running server read its configuration again: all of it is taken over, or nothing.

    Running requests finish as they began. Fails (exit code 2) if the file is wrong or needs a restart.
    """
    from cli import reload_command

    reload_command.reload(port, dry_run, as_json)


@app.command(epilog=_examples("hostler version", "hostler version --json"))
@friendly
def version(as_json: Json = False) -> None:
    """Show the versions of hostler and of the libraries it runs on."""
    from cli import control

    control.version(as_json)


client_commands.add_to(app)
logs_command.add_to(app)
remote_commands.add_to(app)

if __name__ == "__main__":
    app()
