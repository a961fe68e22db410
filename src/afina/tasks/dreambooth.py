"""Teaching a diffusion model one subject from a few pictures of it (Ruiz et al., https://arxiv.org/abs/2208.12242).

A row is a picture of the subject with its prompt and, where prior preservation is asked for, a picture of its class that the
base made itself: it is learned too, so that "dog" does not come to mean this dog alone. What the model reads is noise over
latents; pictures and prompts are encoded once, by parts of the pipeline that are then let go, unless they change:
text encoders that are trained, or squares that are cut at random.

All pictures are learned from. The figure is the loss on them with noise that is the same every time, beside the base's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afina.core.files import cache_folder, write_weights
from afina.data.example import Column, Example, Kind
from afina.data.pictures import PICTURE, read_picture
from afina.diffusion.denoiser import Denoiser
from afina.diffusion.drawing import draw, without_prompt
from afina.diffusion.factors import DIFFUSERS_NAME, factors_of_adapter, to_diffusers
from afina.diffusion.families import Condition
from afina.diffusion.kept import Kept
from afina.diffusion.loading import with_file
from afina.diffusion.noise import Noise, seed_of
from afina.diffusion.pictures import scaled, square
from afina.diffusion.pipelines import PipelineConfig, load_part, make_pipeline, pipeline_config, pipeline_folder
from afina.errors import CheckpointError, ConfigError
from afina.memory.loading import device_of_process
from afina.memory.measure import is_out_of_memory, release
from afina.tasks.dreambooth_rows import DreamBoothOptions, picture_with_prompt, table_of_pictures
from afina.tasks.task import Batch, Encoded, Feature, Figure, Task

__all__ = ["DreamBooth"]

_MOMENTS = 4  # of noise, at which the figure is measured
_FORM = 1  # of what is kept on the disk
_CLOSE, _CLOSE_NARROW = 1e-4, 5e-2  # of what the model says under diffusers, in float32 and in 16 bits
# What is adapted unless the recipe says otherwise: the projections of every attention, by their names in pipelines.
ATTENTION = r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|q_proj|k_proj|v_proj|out_proj)"


class DreamBooth(Task):
    """See the module."""

    name = "dreambooth"
    task_type = None
    kind = Kind(
        columns={
            "image": Column("a picture of the subject", ("image",), medium=PICTURE),
            "text": Column("its prompt", ("prompt", "text")),
            "text_pair": Column("a picture of its class", ("class_image",), required=False, medium=PICTURE),
        },
        labels="none",
        make=picture_with_prompt,
        held_out=False,
    )
    figures = {"loss": Figure("loss with the same noise", ".4f", better=-1)}
    Options = DreamBoothOptions
    smooths, untuned = False, True
    unit, reads_files, pipelines = "pictures", True, True

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(processor, options, learned)
        self.config: PipelineConfig | None = None  # of the base, once that is loaded
        self.store = Kept(cache_folder("pictures"))
        self.noise: Noise | None = None

    @classmethod
    def kind_for(cls, options: Mapping[str, Any]) -> Kind:
        """Pictures lie in folders that the options name."""
        known = {f.name for f in dataclasses.fields(cls.Options)}
        made = cls.Options(**{k: v for k, v in options.items() if k in known})
        return dataclasses.replace(cls.kind, read=lambda path: table_of_pictures(made, path) if path.is_dir() else None)

    @classmethod
    def wrong_options(cls, options: Any) -> list[str]:
        """What is wrong with them together."""
        found = []
        if not options.instance_prompt:
            found.append("instance_prompt is missing: the prompt of the pictures, such as 'a photo of sks dog'")
        if bool(options.class_prompt) != bool(options.class_folder):
            lacks = "class_folder" if options.class_prompt else "class_prompt"
            found.append(f"{lacks} is missing: prior preservation needs the class's prompt and the folder of its pictures")
        if options.cache == "on" and (options.varies or options.text_encoders):
            why = "task.text_encoders=true" if options.text_encoders else options.varies
            found.append(f"cache (on): what is encoded changes from step to step ({why}); leave one of the two out")
        return found

    @classmethod
    def method_defaults(cls, method: str) -> dict[str, Any]:
        """Options of a method that suit pipelines."""
        return {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION} if method in ("lora", "dora") else {}

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The prompts."""
        return {"prompts": sorted({e.value for e in (*train, *others)})}

    @classmethod
    def stand_ins(cls, options: Any) -> list[Example]:
        """A picture with one of the class."""
        other = "class" if options.class_prompt else ""
        return [
            Example(
                f"picture {other}", "", 1, value=options.instance_prompt or "a photo", row={"image": "", "text_pair": other}
            )
        ]

    # --- model

    def load_model(self, path: str) -> Any:
        """The parts of the pipeline that a step needs."""
        self.config = config = pipeline_config(path)
        if self.options.text_tokens is not None:
            if config.family.tokens == 77:
                raise ConfigError(
                    f"task.text_tokens={self.options.text_tokens}: prompts of a {config.family.pipeline} have 77 tokens"
                )
            config.tokens = self.options.text_tokens
        family = config.family
        self.noise = Noise.of(load_part(config, "scheduler"), flow=family.flow)
        unit = self.factor * family.patch
        if self.size % unit:
            raise ConfigError(f"task.resolution={self.size}: expected a multiple of {unit} for a {family.pipeline}")
        others = [*(family.text_encoders if self.trains_texts else ()), *(["vae"] if not self.pictures_kept else [])]
        return Denoiser.load(config, others, self.storage)

    @property
    def trains_texts(self) -> bool:
        """Whether prompts are encoded in every step."""
        return self.options.text_encoders or self.options.cache == "off"

    @property
    def pictures_kept(self) -> bool:
        """Whether pictures are encoded once."""
        return not self.options.varies and self.options.cache != "off"

    @property
    def factor(self) -> int:
        """Pixels to a latent, each way."""
        return 2 ** (len(self._said("vae", "block_out_channels")) - 1)

    @property
    def size(self) -> int:
        """Pixels of a side."""
        assert self.config is not None
        return self.options.resolution or self._said(self.config.family.core, "sample_size", 128) * self.factor

    def _said(self, part: str, key: str, other: Any = None) -> Any:
        """What the configuration of a part says, or the `other` where it says nothing."""
        return json.loads((pipeline_folder(self._config.path) / part / "config.json").read_text(encoding="utf-8")).get(
            key, other
        )

    def idle(self, model: Any) -> list[str]:
        """The encoder of pictures and the text encoders that are not trained, by whole names."""
        assert self.config is not None
        trained = self.config.family.clip if self.options.text_encoders else ()
        frozen = [*(["vae"] if not self.pictures_kept else []), *(t for t in model.texts if t not in trained)]
        inside = [n for n, m in model.named_modules() if n.split(".")[0] in frozen and "weight" in m._parameters]
        return inside

    def limit(self, model: Any) -> int:
        """Tokens of a prompt."""
        return int(model.config.tokens)

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Features that name pictures and prompts; what is kept of them is computed here."""
        ids = self.tokenizer([e.value for e in examples], truncation=False, padding=False)["input_ids"]
        length = min(limit, max(len(row) for row in ids)) if max_length is None else max_length
        features = []
        for i, (example, row) in enumerate(zip(examples, ids, strict=True)):
            feature: Feature = {"input_ids": list(row[:length]), "row": i, "picture": example.row["image"],
                                "held": _digest(example.row["image"]), "prompt": example.value}  # fmt: skip
            if other := example.row.get("text_pair"):
                feature |= {"other": other, "other_held": _digest(other)}
            features.append(feature)
        if not self.storage.empty:
            self._encode_once(features)
        notes = []
        if self.pictures_kept and not self.trains_texts:
            notes.append("pictures and prompts are encoded once, by parts of the pipeline that are let go")
        return Encoded(features, sum(len(row) > length for row in ids), length, notes)

    @property
    def prompts(self) -> list[str]:
        """All that may be asked for, by number."""
        named = [*self.learned.get("prompts", ()), self.options.class_prompt, *self.shown_prompts, ""]
        return list(dict.fromkeys(named))

    @property
    def shown_prompts(self) -> list[str]:
        """Those of the report."""
        return self.options.show or [self.options.instance_prompt]

    def _encode_once(self, features: Sequence[Feature]) -> None:
        """Latents of all pictures and embeddings of all prompts, where they are kept and not known yet."""
        device = device_of_process()
        if self.pictures_kept:
            wanted = {f["held"]: f["picture"] for f in features}
            wanted |= {f["other_held"]: f["other"] for f in features if "other" in f}
            encoder: list[Any] = []

            def latents(path: str) -> dict[str, torch.Tensor]:
                if not encoder:
                    encoder.append(load_part(self._config, "vae").to(device).eval())
                return self._moments(encoder[0], path, device)

            for held, path in wanted.items():
                self.store.get(self._about("latents", held), partial(latents, path))
            if encoder:
                encoder.clear()
                release(device)
        if not self.trains_texts:
            self._encode_prompts(self.prompts)

    @torch.no_grad()
    def _encode_prompts(self, prompts: Sequence[str]) -> None:
        """Embeddings of those that are not known yet, by text encoders that are loaded and let go again."""
        waiting = [p for p in dict.fromkeys(prompts) if not self.store.has(self._about("prompt", p))]
        if not waiting:
            return
        config, device = self._config, device_of_process()
        texts = [t for t in config.family.text_encoders if t in config.parts]
        parts = {t: load_part(config, t, self.storage).to(device).eval() for t in texts}
        pipeline = make_pipeline(config, **parts)
        for prompt in waiting:
            encoded = partial(config.family.condition, pipeline, [prompt], device, config.tokens)
            self.store.get(self._about("prompt", prompt), encoded)
        del parts, pipeline, encoded
        release(device)

    @property
    def _config(self) -> PipelineConfig:
        assert self.config is not None
        return self.config

    def _about(self, what: str, of: str) -> list[Any]:
        """All that a tensor which is kept follows from."""
        folder = pipeline_folder(self._config.path)
        names = ["vae"] if what == "latents" else [n for n in self._config.parts if n.startswith(("text_enc", "tokenizer"))]
        files = [p for name in names for p in sorted((folder / name).glob("*"))]
        known = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        shape = self.size if what == "latents" else [self.storage.weights, self._config.tokens]
        return [_FORM, what, of, str(folder.resolve()), known, shape]

    @torch.no_grad()
    def _moments(self, vae: Any, path: str, device: Any) -> dict[str, torch.Tensor]:
        """Mean and logarithm of the variance of a picture's latents `[1, 2 * channels, height, width]`, and sizes."""
        pixels = scaled(read_picture(path), self.size)
        cut, begin = square(pixels, self.size)
        found = vae.encode(cut[None].to(device)).latent_dist.parameters
        return {"moments": found, "sizes": _sizes(pixels, begin, self.size)}

    def ready(self, feature: Feature, chance: str | None = None) -> Feature:
        """With its latents or pixels, and the numbers that seed what is drawn of it."""
        made = dict(feature)
        for picture, held in (("picture", "held"), ("other", "other_held")):
            if picture not in feature:
                continue
            seed = seed_of(chance, feature[held], picture)
            made[f"{picture}_seed"] = seed
            if self.storage.empty:
                continue
            if self.pictures_kept:
                made[f"{picture}_read"] = self.store.get(self._about("latents", feature[held]), _lost)
                continue
            pixels, drawn = scaled(read_picture(feature[picture]), self.size), None
            if chance is not None:
                drawn = torch.Generator().manual_seed(seed)
            cut, begin = square(pixels, self.size, drawn, crop=self.options.crop == "random", flip=self.options.flip)
            made[f"{picture}_read"] = {"pixels": cut[None], "sizes": _sizes(pixels, begin, self.size)}
        return made

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Pictures of the subject first, then those of the class: `moments [pictures, 2 * channels, height, width]` or
        `pixels [pictures, 3, size, size]`, `sizes [pictures, 6]`, `prompt` by number, `seed`, `weight`; and what the text
        encoders made of the prompts, where that is kept."""
        features = [f if "picture_seed" in f else self.ready(f) for f in features]
        numbers = {prompt: i for i, prompt in enumerate(self.prompts)}
        rows = [("picture", f, f["prompt"], 1.0) for f in features]
        rows += [("other", f, self.options.class_prompt, self.options.prior_weight) for f in features if "other" in f]
        batch: Batch = {
            "prompt": torch.tensor([numbers[prompt] for _, _, prompt, _ in rows]),
            "seed": torch.tensor([f[f"{part}_seed"] for part, f, _, _ in rows]),
            "weight": torch.tensor([weight for *_, weight in rows]),
            "subject": torch.tensor([part == "picture" for part, *_ in rows]),
        }
        if self.storage.empty:
            return batch | self._outlines(len(rows))
        read = [f[f"{part}_read"] for part, f, _, _ in rows]
        batch |= {key: torch.cat([one[key] for one in read]) for key in read[0]}
        if not self.trains_texts:
            known = [self._condition(prompt) for _, _, prompt, _ in rows]
            batch |= {key: torch.cat([one[key] for one in known]) for key in known[0]}
        return batch

    def _condition(self, prompt: str) -> Condition:
        return self.store.get(self._about("prompt", prompt), _lost)

    def _outlines(self, rows: int) -> Batch:
        """Tensors of the shapes that a batch has, without contents."""
        side, config = self.size // self.factor, self._config
        made: dict[str, tuple[int, ...]] = {"sizes": (rows, 6)}
        if self.pictures_kept:
            made["moments"] = (rows, 2 * self._said("vae", "latent_channels"), side, side)
        else:
            made["pixels"] = (rows, 3, self.size, self.size)
        if not self.trains_texts:
            core = partial(self._said, config.family.core)
            if config.family.core == "unet":
                made["prompt_embeds"] = (rows, 77, core("cross_attention_dim"))
            else:
                tokens = config.tokens + (77 if config.family.name == "sd3" else 0)
                made["prompt_embeds"] = (rows, tokens, core("joint_attention_dim"))
                made["pooled_prompt_embeds"] = (rows, core("pooled_projection_dim"))
            if config.family.name == "sdxl":
                made["pooled_prompt_embeds"] = (rows, self._said("text_encoder_2", "projection_dim"))
        return {key: torch.empty(shape, device="meta") for key, shape in made.items()}

    def amount(self, batch: Batch) -> int:
        """Its pictures."""
        return len(batch["seed"])

    @property
    def varies(self) -> str:
        """Noise is drawn anew in every step."""
        return "noise"

    # --- training

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Pictures of the subject."""
        return float(batch["subject"].sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Squared error of what the model says, the mean of each picture, summed by weight."""
        chances = [torch.Generator().manual_seed(seed) for seed in batch["seed"].tolist()]
        latents = self._latents(model, batch, chances)
        assert self.noise is not None
        times = [0.0 if self.storage.empty else self.noise.time(chance) for chance in chances]
        return (self._errors(model, batch, latents, chances, times) * batch["weight"]).sum()

    def _latents(self, model: Any, batch: Batch, chances: Sequence[torch.Generator] | None) -> torch.Tensor:
        """Of each picture, drawn as its encoder says they spread; without `chances` in the middle."""
        if "pixels" in batch:
            vae = model.get_base_model().vae if hasattr(model, "get_base_model") else model.vae
            with torch.no_grad(), torch.autocast(batch["pixels"].device.type, enabled=False):
                moments = vae.encode(batch["pixels"].to(vae.dtype)).latent_dist.parameters
        else:
            moments = batch["moments"]
        mean, spread = moments.float().chunk(2, dim=1)
        if chances is not None:
            mean = mean + (0.5 * spread.clamp(-30, 20)).exp() * self._drawn(chances, mean)
        return (mean - (self._vae("shift_factor") or 0.0)) * self._vae("scaling_factor")

    def _drawn(self, chances: Sequence[torch.Generator], like: torch.Tensor) -> torch.Tensor:
        """Normal noise of the shape of `like`, each row by its own chance."""
        if self.storage.empty:
            return torch.randn_like(like)
        return torch.stack([torch.randn(like.shape[1:], generator=chance) for chance in chances]).to(like.device)

    def _vae(self, key: str) -> Any:
        return self._said("vae", key, {"scaling_factor": 0.18215}.get(key))  # of files from before it was said

    def _errors(
        self, model: Any, batch: Batch, latents: torch.Tensor, chances: Sequence[torch.Generator], times: Sequence[float]
    ) -> torch.Tensor:
        """Mean squared error of each picture `[pictures]`, float32."""
        said, target = self._asked(model, batch, latents, self._drawn(chances, latents), times)
        return ((said - target) ** 2).mean(dim=(1, 2, 3))

    def _asked(
        self, model: Any, batch: Batch, latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says of noisy latents, and what it should."""
        assert self.noise is not None
        noisy, target = self.noise.mixed(latents, noise, times)
        condition = {key: batch[key] for key in ("prompt_embeds", "pooled_prompt_embeds", "sizes") if key in batch}
        prompts = [self.prompts[i] for i in batch["prompt"].tolist()] if self.trains_texts else []
        at = torch.tensor(times, device=latents.device)
        return model(noisy, at, condition, prompts), target

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The loss of each picture of the subject, the mean over moments of noise that are always the same."""
        assert self.noise is not None
        own = _subjects(batch)
        latents = self._latents(model, own, None)
        total = torch.zeros(len(latents), device=latents.device)
        moments = 1 if self.storage.empty else _MOMENTS  # which take no more memory one after the other
        for i, moment in enumerate(self.noise.spread(moments)):
            chances = [torch.Generator().manual_seed(seed_of(seed, i)) for seed in own["seed"].tolist()]
            total += self._errors(model, own, latents, chances, [moment] * len(latents))
        return (total / moments).tolist()

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """What the model says at one moment, `[pictures of the subject, channels, height, width]`."""
        assert self.noise is not None
        own = _subjects(batch)
        latents = self._latents(model, own, None)
        chances = [torch.Generator().manual_seed(seed) for seed in own["seed"].tolist()]
        said, _ = self._asked(model, own, latents, self._drawn(chances, latents), [self.noise.spread(1)[0]] * len(latents))
        return said

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """The mean loss."""
        return {"rows": len(answers), "loss": sum(answers) / len(answers)}

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The loss of the picture."""
        return {"answer": f"{answer:.6f}"}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The same as a number."""
        return {"loss": answer}

    # --- what is written beside the adapter

    def finish(self, model: Any, folder: Path, features: Sequence[Feature]) -> dict[str, Any]:
        """Pictures before and after, by the same seeds, and the adapter as diffusers reads it; the model is used up."""
        return {**self._show(model, folder), **self._as_diffusers(model, folder / "adapter", features)}

    @torch.no_grad()
    def _as_diffusers(self, model: Any, folder: Path, features: Sequence[Feature]) -> dict[str, Any]:
        """Write the file that diffusers loads, let it load it, and compare what the model says (T46)."""
        try:
            factors = factors_of_adapter(folder)
        except ConfigError as error:
            return {"not_in_diffusers": str(error)}
        path = folder / DIFFUSERS_NAME
        write_weights(path, to_diffusers(factors), {})
        if importlib.util.find_spec("peft") is None:
            return {"diffusers": {"file": path.name, "compared": "no: diffusers needs peft to load it (pip install peft)"}}
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in self.collate(features).items()}
        expected = self.outputs(model.eval(), batch)
        loaded = with_file(model.unload(), self._config, path)
        difference = float((self.outputs(loaded, batch) - expected).abs().max())
        if not difference <= (_CLOSE if self.storage.weights == "fp32" else _CLOSE_NARROW):
            raise CheckpointError(
                f"{path}, loaded by diffusers, does not act as the adapter that was trained: the model's answers differ by "
                f"up to {difference:.2g}. Do not use that file, and please report this"
            )
        return {"diffusers": {"file": path.name, "largest_difference": difference}}

    def _show(self, model: Any, folder: Path) -> dict[str, Any]:
        if not self.options.show_pictures:
            return {}
        (folder / "pictures").mkdir(exist_ok=True)
        base, made = model.get_base_model(), list[dict[str, Any]]()
        device = next(base.core.parameters()).device
        try:
            vae = load_part(self._config, "vae").to(device)
            for n, prompt in enumerate(self.shown_prompts):
                seeds = [self.options.show_seed + i for i in range(self.options.show_pictures)]
                for when in ("before", "after"):
                    with model.disable_adapter() if when == "before" else nullcontext():
                        drawn = self._draw(base, vae, prompt, seeds)
                    for seed, picture in zip(seeds, drawn, strict=True):
                        picture.save(folder / "pictures" / f"{n}-{seed}-{when}.png")
                made += [{"prompt": prompt, "seed": seed, "before": f"pictures/{n}-{seed}-before.png",
                          "after": f"pictures/{n}-{seed}-after.png"} for seed in seeds]  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release(device)
        return {"pictures": made}

    def drawn(self, model: Any, prompt: str, seed: int) -> tuple[Any, Any]:
        """A picture of a prompt by the base, and one by the adapter from the same noise."""
        base = model.get_base_model()
        vae = load_part(self._config, "vae").to(next(base.core.parameters()).device)
        with model.disable_adapter():
            before = self._draw(base, vae, prompt, [seed])
        return before[0], self._draw(base, vae, prompt, [seed])[0]

    @torch.no_grad()
    def _draw(self, base: Any, vae: Any, prompt: str, seeds: list[int]) -> list[Any]:
        device = next(base.core.parameters()).device
        if self.trains_texts:
            condition, empty = base.encode([prompt], device), base.encode([""], device)
        else:
            self._encode_prompts([prompt, ""])
            condition, empty = self._condition(prompt), self._condition("")
        none = without_prompt(self._config, condition, empty)
        steps = self.options.show_steps
        return draw(self._config, base.core, vae, condition, none, seeds=seeds, steps=steps, size=self.size)


def _digest(path: str) -> str:
    """Hash of a file's content; of its name where it is none, as in a plan."""
    file = Path(path)
    return hashlib.blake2b(file.read_bytes() if file.is_file() else path.encode(), digest_size=16).hexdigest()


def _subjects(batch: Batch) -> Batch:
    """Its pictures of the subject, which come first."""
    count = int(batch["subject"].sum())
    return {key: value[:count] for key, value in batch.items()}


def _sizes(pixels: torch.Tensor, begin: tuple[int, int], size: int) -> torch.Tensor:
    """The picture's height and width, where the square begins, and its size: `[1, 6]`."""
    return torch.tensor([[float(pixels.shape[1]), float(pixels.shape[2]), *map(float, begin), float(size), float(size)]])


def _lost() -> Any:
    raise RuntimeError("what was encoded before training is gone")
