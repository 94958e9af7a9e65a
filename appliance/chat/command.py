"""``appliance chat``: its options. What it does is imported when it runs."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

OWN = Parameter(negative=(), show_env_var=False)  # see appliance.cli_sources.Variables


def chat(
    *model_and_options: Annotated[str, Parameter(allow_leading_hyphen=True)],
    url: str | None = None,
    api_key: str | None = None,
    model: Annotated[str | None, OWN] = None,
    prompt: Annotated[str | None, Parameter(name=["--prompt", "-p"])] = None,
    system: Annotated[str | None, Parameter(name=["--system", "-s"])] = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    ssl_ca_certs: Annotated[str | None, OWN] = None,
    insecure: Annotated[bool, OWN] = False,
) -> int:
    """Talk to a model in the terminal, or ask it one question: with --prompt or from a pipe, and only the answer is printed.

    Parameters
    ----------
    model_and_options
        A model to start a server for (a directory, or a name on the hub), and options of `appliance serve`. Without them: the
        server that runs at http://127.0.0.1:8000, or one with the embedded demo model.
    url
        Where a server runs: anything with OpenAI's API.
    api_key
        A key of that server, where it asks for one.
    model
        The name of one of that server's models; the first one when left out.
    prompt
        One question. What comes by a pipe is put below it; @FILE in it adds that file.
    system
        The system prompt.
    temperature
        How freely tokens are drawn; 0: the likeliest. As the model says when left out, like the following.
    top_p
        Tokens are drawn from the likeliest that together have this probability.
    max_tokens
        Most tokens of an answer.
    ssl_ca_certs
        Trust these certificates (PEM), of a server with one of its own.
    insecure
        Take any certificate.
    """
    from appliance.chat.run import Asked, main

    settings = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    given = {name: value for name, value in settings.items() if value is not None}
    return main(Asked(model_and_options, url, api_key, model, prompt, system or "", given, ssl_ca_certs, insecure))
