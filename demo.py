"""A page to try models on: samples by class name, steps, two models side by side, painting, the tokenizer.

    python -m demo --ckpt out/quickstart/sar out/quickstart/flexvar     # needs gradio: pip install gradio

It listens on this machine alone unless --host says otherwise, and writes to --out only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from models.pipeline import SARPipeline, from_pil, open_pipeline, to_pil
from models.scales import ScaleSchedule
from utils.reporting.pictures import coarse_to_fine
from utils.runtime.entry import check_output_directory, entry
from utils.runtime.flags import Parser, whole
from utils.runtime.image_files import upright_rgb
from utils.runtime.numerics import Precision

NONE = "none"
MOST = 16  # images at a time
LEAST = 256  # pixels of a side as it is shown
Report = Callable[[int, int, str], None]  # scales that are done, of how many, of what


class Studio:
    """Models that the page can use, opened when they are first chosen, and the folder that its pictures go to."""

    def __init__(self, ckpts: list[str], out: Path, device: torch.device, precision: str = "auto"):
        self.ckpts = by_name(ckpts)
        self.names, self.out, self.device = list(self.ckpts), out, device
        self.precision = Precision(precision, device)
        self.open = lru_cache(maxsize=3)(self._open)

    def _open(self, name: str) -> SARPipeline:
        if name not in self.ckpts:
            raise ValueError(f"{name} is none of the models of --ckpt")
        return open_pipeline(self.ckpts[name]).to(self.device)

    def draw(
        self,
        name: str,
        label: str,
        cfg: float,
        top_k: int,
        top_p: float,
        seed: int,
        n: int,
        pn: str,
        report: Report = lambda done, total, what: None,
    ) -> dict[int, list[Image.Image]]:
        """Images of a class as they stand after each scale, {side: n pictures}. Raises ValueError in words."""
        pipeline = self.open(name)
        schedule = pipeline.model.trim(ScaleSchedule.parse(pn)) if pn.strip() else pipeline.schedule
        done = 0

        def tick(side: int, codes: Tensor) -> Tensor:
            nonlocal done
            done += 1
            report(done, len(schedule), name)
            return codes

        options = {"cfg": cfg, "top_k": int(top_k), "top_p": top_p}
        if not 1 <= n <= MOST:
            raise ValueError(f"between 1 and {MOST} images at a time, not {n}")
        with self.precision.autocast():
            return pipeline.steps(label, n=int(n), seed=int(seed), schedule=schedule, edit=tick, **options)

    def paint(
        self,
        name: str,
        image: Image.Image,
        mask: Image.Image | None,
        share: float,
        label: str,
        cfg: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> Image.Image:
        """A picture repainted where the mask is white; with a share below 1, shrunk to it and painted around."""
        pipeline = self.open(name)
        options: dict[str, Any] = {"cfg": cfg, "seed": int(seed), "top_k": int(top_k), "top_p": top_p}
        with self.precision.autocast():
            if share < 1:
                return pipeline.outpaint(image, share, label, **options)[0]
            if mask is None or mask.getbbox() is None:
                raise ValueError("nothing is to be painted: draw over the part that should change")
            return pipeline.inpaint(image, mask, label, **options)[0]

    @torch.no_grad()
    def reconstruct(self, name: str, image: Image.Image) -> dict[int, Image.Image]:
        """A picture through the tokenizer, as its codes up to each scale show it."""
        pipeline = self.open(name)
        pixels = from_pil(upright_rgb(image), pipeline.side).to(self.device)
        codes = pipeline.vae.tokenize(pixels, pipeline.schedule.sides, pipeline.supervision)
        return {s: to_pil(pipeline.vae.decode_at(codes, s, pipeline.schedule))[0] for s in codes}

    def save(self, images: list[Image.Image], stem: str, **settings: Any) -> list[str]:
        """Write pictures with the settings that made them, under "sar" in their PNG metadata. Returns their paths."""
        self.out.mkdir(parents=True, exist_ok=True)
        paths, when = [], time.strftime("%Y%m%d-%H%M%S")
        for i, image in enumerate(images):
            about = PngInfo()
            about.add_text("sar", json.dumps({**settings, "image": i}, ensure_ascii=False))
            path = self.out / f"{when}_{stem}_{i:02d}.png"
            image.save(path, pnginfo=about)
            paths.append(str(path))
        return paths


def by_name(ckpts: list[str]) -> dict[str, str]:
    """Short names of what --ckpt names: the last part of each path, or all of it where that is not enough."""
    last = [Path(ckpt).name for ckpt in ckpts]
    return {name if last.count(name) == 1 else ckpt: ckpt for name, ckpt in zip(last, ckpts, strict=True)}


def at_one_size(image: Image.Image, side: int) -> Image.Image:
    """A coarse step enlarged to the side of the finest one."""
    return image.resize((side, side), Image.Resampling.NEAREST) if image.width != side else image


def mask_of(drawn: dict) -> tuple[Image.Image, Image.Image]:
    """Picture and mask of what the editor gives: the mask is white where something was drawn over the picture."""
    background = drawn.get("background")
    if background is None:
        raise ValueError("choose a picture first")
    picture, mask = background.convert("RGB"), Image.new("L", background.size)
    for layer in drawn.get("layers", []):
        alpha = layer.convert("RGBA").getchannel("A").point(lambda a: 255 if a else 0)
        mask.paste(255, (0, 0), alpha.resize(mask.size))
    return picture, mask


def build_page(studio: Studio) -> Any:
    """The page, a gradio.Blocks."""
    import gradio as gr

    def in_words(function: Callable) -> Callable:
        """Errors of ours shown as they are, on the page."""

        def guarded(*args: Any) -> Any:
            try:
                return function(*args)
            except (ValueError, OSError) as error:
                raise gr.Error(str(error), duration=None) from None

        return guarded

    def names_of(name: str) -> list[str]:
        return studio.open(name).class_names

    first = studio.names[0]
    classes = names_of(first)
    digits = len(classes) < 1000  # a model of one's own is guided less than the released ones
    one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}

    with gr.Blocks(title="SAR", analytics_enabled=False) as page:
        gr.Markdown("# SAR\nClass-conditional images, from coarse to fine. Equal seeds, equal noise.")
        with gr.Row():
            model = gr.Dropdown(studio.names, value=first, label="model", elem_id="model")
            beside = gr.Dropdown([NONE, *studio.names], value=NONE, label="beside it", elem_id="beside")
            label = gr.Dropdown(
                classes, value=classes[0], label="class (a name or a number)", allow_custom_value=True, elem_id="class"
            )
            seed = gr.Number(0, label="seed", precision=0, elem_id="seed")
            cfg = gr.Slider(0, 10, 0.5 if digits else 2.5, step=0.1, label="guidance")
        model.change(in_words(lambda name: gr.Dropdown(names_of(name))), model, label, **one)

        with gr.Tab("Sample"):
            with gr.Row():
                top_k = gr.Number(0 if digits else 900, label="top-k (0: all)", precision=0)
                top_p = gr.Slider(0, 1, 0.0 if digits else 0.95, label="top-p (0: all)")
                n = gr.Slider(1, MOST, 4, step=1, label="images")
                pn = gr.Textbox("", label="scales, like 1_2_3_4 (empty: the model's own)", elem_id="pn")
            go = gr.Button("Draw", variant="primary", elem_id="draw")
            last = len(studio.open(first).schedule)
            step = gr.Slider(1, max(2, last), last, step=1, label="after scale", elem_id="step")
            with gr.Row():
                left = gr.Gallery(label="model", columns=4, elem_id="left", format="png")
                right = gr.Gallery(label="beside it", columns=4, elem_id="right", format="png", visible=False)
            strip = gr.Image(label="coarse to fine, the first image", elem_id="strip", format="png")
            files = gr.File(label="pictures, with their settings in the PNG", file_count="multiple", elem_id="files")
            kept = gr.State([])  # of each model: the pictures after each scale

            def draw(model, beside, label, cfg, top_k, top_p, seed, n, pn, progress=gr.Progress()):  # noqa: B008
                drawn, paths, sides = [], [], []
                for name in [model] if beside == NONE else [model, beside]:
                    steps = studio.draw(
                        name, label, cfg, top_k, top_p, seed, int(n), pn,
                        lambda done, total, what: progress((done, total), desc=what, unit="scales"),
                    )  # fmt: skip
                    sides, side = sides or list(steps), max(images[0].width for images in steps.values())
                    drawn.append([[at_one_size(image, side) for image in images] for images in steps.values()])
                    settings = {"model": name, "class": label, "cfg": cfg, "top_k": top_k, "top_p": top_p}
                    settings |= {"seed": seed, "scales": "_".join(map(str, steps))}
                    paths += studio.save(drawn[-1][-1], Path(name).stem, **settings)
                last, rows = len(drawn[0]), {s: [images[0]] for s, images in zip(sides, drawn[0], strict=True)}
                return (
                    drawn,
                    gr.Slider(1, max(2, last), last),
                    gr.Gallery(drawn[0][-1]),
                    gr.Gallery(drawn[1][-1] if len(drawn) > 1 else [], visible=len(drawn) > 1),
                    coarse_to_fine(rows, [""]),
                    paths,
                )

            inputs = [model, beside, label, cfg, top_k, top_p, seed, n, pn]
            go.click(in_words(draw), inputs, [kept, step, left, right, strip, files], **one)

            def show(kept: list, step: float) -> tuple:
                shown = [steps[min(int(step), len(steps)) - 1] for steps in kept]
                return shown[0] if shown else [], shown[1] if len(shown) > 1 else []

            step.release(show, [kept, step], [left, right])

        with gr.Tab("Paint"):
            gr.Markdown("Draw over what should change. Or shrink the picture, and what is around it is painted.")
            brush = max(3, studio.open(first).side // 12)  # pixels
            with gr.Row():
                editor = gr.ImageEditor(
                    label="picture and mask", type="pil", image_mode="RGBA", elem_id="editor", format="png",
                    brush=gr.Brush(default_size=brush, colors=["#ffffff"], color_mode="fixed"), layers=False,
                )  # fmt: skip
                painted = gr.Image(label="painted", elem_id="painted", format="png")
            share = gr.Slider(0.3, 1, 1, step=0.05, label="shrink to (1: paint what is drawn over)")
            paint_button = gr.Button("Paint", variant="primary", elem_id="paint")
            painted_file = gr.File(label="picture, with its settings in the PNG", elem_id="painted_file")

            def paint(model, editor, share, label, cfg, top_k, top_p, seed):
                picture, mask = mask_of(editor or {})
                image = studio.paint(model, picture, mask, share, label, cfg, top_k, top_p, seed)
                settings = {"model": model, "class": label, "cfg": cfg, "top_k": top_k, "top_p": top_p}
                [path] = studio.save([image], "painted", **settings, seed=seed, share=share)
                return at_one_size(image, max(image.width, LEAST)), path

            paint_button.click(
                in_words(paint), [model, editor, share, label, cfg, top_k, top_p, seed], [painted, painted_file], **one
            )

        with gr.Tab("Tokenizer"):
            picture = gr.Image(label="picture", type="pil", elem_id="picture", format="png")
            see = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
            scales = gr.Gallery(
                label="as its codes up to each scale show it", columns=5, elem_id="scales", format="png"
            )

            def reconstruct(model, picture):
                if picture is None:
                    raise ValueError("choose a picture first")
                found = studio.reconstruct(model, picture)
                side = max(image.width for image in found.values())
                return [(at_one_size(image, side), f"side {s}") for s, image in found.items()]

            see.click(in_words(reconstruct), [model, picture], scales, **one)
    return page


def serve(args: argparse.Namespace) -> Any:
    """Start the page. Returns it, running."""
    cache = check_output_directory(args.out, "--out") / "cache"
    os.environ["GRADIO_TEMP_DIR"] = str(cache.resolve())  # before gradio is imported: its own copies, too
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the page needs gradio: pip install gradio") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studio = Studio(args.ckpt, args.out, device, args.precision)
    page = build_page(studio)
    fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]  # of this machine: none is fetched
    page.queue().launch(
        server_name=args.host, server_port=args.port or None, prevent_thread_lock=True, quiet=True, show_error=True,
        theme=gr.themes.Base(font=fonts), ssr_mode=False,
    )  # fmt: skip
    return page


@entry
def main() -> None:
    parser = Parser(__doc__, prog="python -m demo")
    parser.add_argument(
        "--ckpt", nargs="+", required=True, help="weight files, runs' directories, pipelines, Hub repositories"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: for other machines, too")
    parser.add_argument("--port", type=whole(0), default=0, help="0: the first free one from 7860 on")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of its pictures")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    args = parser.parse_args()
    page = serve(args)
    print(f"the page is at {page.local_url} (Ctrl-C ends it); pictures go to {args.out}")
    page.block_thread()


if __name__ == "__main__":
    main()
