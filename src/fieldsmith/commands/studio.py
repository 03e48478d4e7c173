"""`fieldsmith studio RUN_OR_MODEL`: the page of studio.py, served to this machine alone until Ctrl-C."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import socket
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.config import Pixels, Words, config
from fieldsmith.errors import InputError

if TYPE_CHECKING:
    from fieldsmith.studio import Studio


@config
class StudioConfig:
    """A local page: move scales, guidance, seed and prompt: fieldsmith studio RUN_OR_MODEL"""

    adapter: Words = ()
    """Adapters over the model, each with a slider: FILE or a run's adapter/, --adapter again for each."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 7860
    """The port of 127.0.0.1 that answers."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""


def studio(words: Sequence[str]) -> Answer:
    """fieldsmith studio RUN_OR_MODEL [--adapter A ...] [--port N]. Raises InputError before anything is served."""
    rest = list(words)
    source = rest.pop(0) if rest and not rest[0].startswith("-") else None
    asked = arguments.parse(StudioConfig(), rest, "studio", "RUN_OR_MODEL: a run's folder, or what --model takes.")
    if source is None:
        raise InputError("no run or model given; name one first, e.g. fieldsmith studio runs/no-triangle")
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the studio's page needs gradio, which is not installed; pip install 'fieldsmith[studio]'")
    check_port(asked.port)
    from fieldsmith.studio import guarded, open_studio  # imports torch: once the words are known to be good

    opened = open_studio(source, asked.adapter, asked.resolution)
    with tempfile.TemporaryDirectory(prefix="fieldsmith-studio-") as folder:
        # read as gradio is imported: where pictures wait to be fetched, and that it tells nobody of its use
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        import fastapi  # comes with gradio
        import gradio
        import uvicorn

        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none is fetched
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(), page(opened), "/", "127.0.0.1", asked.port, allowed_paths=[], theme=theme, ssr_mode=False
        )
        print(f"studio of {source}: http://127.0.0.1:{asked.port} (Ctrl-C ends it)", flush=True)
        served: Any = guarded(app, asked.port, pathlib.Path(folder))
        uvicorn.run(served, host="127.0.0.1", port=asked.port, log_level="error")
    return answer(metrics={"address": f"http://127.0.0.1:{asked.port}"})


def check_port(port: int) -> None:
    """Raises InputError where something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} is in use; name another, e.g. --port {port % 65535 + 1}") from error


def page(opened: Studio) -> Any:
    """The page: settings above, base and corrected model side by side, what is measured of them below."""
    import gradio as gr  # an extra
    import numpy
    import torch
    from PIL import Image

    from fieldsmith import studio as logic
    from fieldsmith.report.grid import picture

    def failing(error: InputError) -> Exception:
        return gr.Error(str(error), duration=None)  # type: ignore[no-any-return]

    def show(prompt: str, seed: float, guidance: float, steps: float, n: float, *scales: float) -> Any:
        try:
            pair = logic.drawn(opened, prompt, scales, int(seed), int(n), int(steps), guidance)
        except InputError as error:
            raise failing(error) from error
        table = [[name, f"{was:.4f}", f"{now:.4f}"] for name, was, now in logic.measures(*pair)]
        return [[picture(image) for image in side] for side in pair] + [table]

    def turn(turns: Any, source: Any, words: str, seed: float, guidance: float, steps: float, *scales: float) -> Any:
        if source is None and not turns:
            raise gr.Error("no picture to begin with; drop one in the box 'start'")
        if not turns:
            side = opened.model.resolution
            image = torch.from_numpy(numpy.array(source.convert("RGB").resize((side, side)))).permute(2, 0, 1) / 255
            turns = [(image, image)]
        try:
            turns = logic.turned(opened, turns, words, scales, int(seed), int(steps), guidance)
        except InputError as error:
            raise failing(error) from error
        return turns, *shown(turns)

    def shown(turns: Any) -> Any:
        sides = [[picture(pair[side]) for pair in turns] for side in (0, 1)]
        rows = logic.measures(turns[-1][0][None], turns[-1][1][None]) if turns else []
        return *sides, [[name, f"{was:.4f}", f"{now:.4f}"] for name, was, now in rows]

    def seen(place: float) -> Any:
        return Image.open(opened.strips[int(place)][1]).convert("RGB")

    with gr.Blocks(title=f"fieldsmith studio: {opened.name}") as blocks:
        gr.Markdown(f"### {opened.name}\nBase and corrected model at equal seeds.")
        with gr.Row():
            prompt = gr.Textbox(label="instruction" if opened.edits else "prompt", scale=3)
            seed = gr.Number(0, label="seed", precision=0)
            guidance = gr.Slider(0, 10, 1, step=0.5, label="guidance (1 is off)")
            steps = gr.Slider(2, 60, 20, step=1, label="sampler steps")
        sliders = [gr.Slider(-2, 2, 1, step=0.05, label=f"scale of {one}") for one in opened.adapters]
        with gr.Row():
            base = gr.Gallery(label="base", columns=4, format="png")
            corrected = gr.Gallery(label="corrected", columns=4, format="png")
        table = gr.Dataframe(headers=["measure", "base", "corrected"], label="of what is shown", interactive=False)
        if opened.edits:
            turns = gr.State([])
            start = gr.Image(label="start", type="pil", height=160)
            with gr.Row():
                go, back = gr.Button("turn", variant="primary"), gr.Button("undo")
            go.click(turn, [turns, start, prompt, seed, guidance, steps, *sliders], [turns, base, corrected, table])
            back.click(lambda t: ((less := logic.undone(t)), *shown(less)), turns, [turns, base, corrected, table])
        else:
            n = gr.Slider(1, 8, 4, step=1, label="images")
            go = gr.Button("draw", variant="primary")
            inputs = [prompt, seed, guidance, steps, n, *sliders]
            for moved in (go.click, prompt.submit, *(slider.release for slider in sliders)):
                moved(show, inputs, [base, corrected, table])
        if opened.strips:
            at = gr.Slider(0, len(opened.strips) - 1, len(opened.strips) - 1, step=1, label="while it trained")
            strip = gr.Image(seen(len(opened.strips) - 1), label="drawn at equal seeds", interactive=False)
            at.change(seen, at, strip)
    return blocks
