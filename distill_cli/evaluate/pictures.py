"""Pictures measured against real ones: by several networks, each with several measures."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli import launch, processes
from distill_cli.config import EvaluateConfig
from distill_cli.data import Images
from distill_cli.data.images import Folder
from distill_cli.data.kinds import PICTURES
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate import statistics
from distill_cli.evaluate.attributes import judge, judged
from distill_cli.evaluate.distances import Statistics
from distill_cli.evaluate.kept import Seen, compute, seen
from distill_cli.evaluate.measures import MEASURES, Needs, Reference, subset
from distill_cli.evaluate.networks import NETWORKS, Network
from distill_cli.evaluate.report import AGAIN, AGAIN_SEED, REFERENCE_SEED, SHOWN, Lowest, Measure
from distill_cli.evaluate.sources import Drawn, File, Pictures, Source

ENOUGH = 10
"""Images for each feature below which a Fréchet distance gets a warning."""


def real_pictures(config: EvaluateConfig, images: Images | None) -> Source | None:
    """The real pictures; None for a file of statistics alone. `images`: the set that --data names, if it is one."""
    path = Path(config.data)
    if isinstance(images, Folder) or (images is None and path.is_dir()):
        return Pictures(path, "--data", config.resolution)
    if images is not None:
        return Drawn(images, range(len(images)), REFERENCE_SEED)
    statistics.refuse_pickle(config.data)
    return None if path.exists() and statistics.holds(path) == (True, False) else File(path, "--data")


class Against(Measure):
    """The real pictures, each taken once: what every network sees of them, and scores of pictures against them."""

    kind = PICTURES

    def __init__(self, config: EvaluateConfig, images: Images | None, there: bool = True) -> None:
        """`there`: whether there are real data at all; what needs none is measured without them."""
        assert config.out is not None
        self.config, self.job, self.where = config, config.out, launch.device(config.device)
        self.source, self.has = real_pictures(config, images) if there else None, Needs.PICTURES
        if self.source is None:
            self.has = Needs.STATISTICS if there else Needs.NOTHING
        for name in config.attributes:
            judge(name)
        self.networks = [NETWORKS[name](config, self.where) for name in dict.fromkeys(config.features)]
        self.shape = next((network.shape for network in self.networks if network.shape), None) if self.source is None else self.source.shape
        named = isinstance(self.source, Pictures | Drawn)  # a file has no names of classes: they are the network's
        self.classes = self.source.classes if named and self.source else next(filter(None, (each.classes for each in self.networks)), ())
        if self.shape is not None:
            for network in self.networks:
                network.check(self.shape, self.classes if named else network.classes, config.data)
        labelled = "classifier" in config.features
        self.knows, self.least = f"--classifier {config.classifier} knows" if labelled else "the reference has", config.neighbours + 2
        self.positions = None if config.classes is None else self._of_classes(config.classes)
        self.chosen = {network: self._chosen(network) for network in self.networks}
        if missing := [name for name in config.measures or () if not any(name in chosen for chosen in self.chosen.values())]:
            raise UsageError(
                f"measures {missing[0]}: nothing in features {', '.join(config.features)} gives it", "accuracy needs classifier"
            )
        self.columns = {
            title: column
            for network, names in self.chosen.items()
            for name in names
            for title, column in MEASURES[name].keys(network).items()
        }
        count = self._count()
        if self.source is not None and count < self.least:
            raise UsageError(f"--data {config.data}: {count} images are too few to measure against", "take more of them")
        if self.source is not None:
            self._refuse_subset(f"--data {config.data} has", count)
        if config.save_statistics is not None and len(self.networks) > 1:
            raise UsageError(f"save_statistics: of one network, and features are {', '.join(config.features)}", "features=NAME")
        self.published = {network: self._published(network) for network in self.networks}
        if config.save_statistics is not None and (self.source is None or self.published[self.networks[0]][0] is not None):
            raise UsageError(f"save_statistics: --data {config.data} is no set of pictures alone", "--data FOLDER, or an .npz of pictures")
        self.read = ("", f"statistics in {config.data}", "" if self.source is None else self.source.about)[self.has]

    def begin(self) -> None:
        found = {network: self._reference(network) for network in self.networks}
        self.references = {network: reference for network, (reference, _) in found.items()}
        self.text = "; ".join(dict.fromkeys(text for _, text in found.values()))
        self.about = "; ".join(map(self._protocol, self.networks))

    def _count(self) -> int:
        """The number of real pictures; of statistics alone 0."""
        return len(self.positions) if self.positions is not None else 0 if self.source is None else len(self.source)

    def _refuse_subset(self, whose: str, count: int) -> None:
        """Raise UsageError if `count` pictures are fewer than the subset that is asked for."""
        size = self.config.kid_subset_size or 0
        if size > count and any("kid" in names for names in self.chosen.values()):
            raise UsageError(f"kid_subset_size {size}: {whose} {count} images", "take fewer")

    def _of_classes(self, classes: list[int]) -> list[int]:
        """The positions of the real pictures of these classes."""
        if self.source is None or self.source.labels is None:
            raise UsageError(f"--classes: {self.config.data} has no labels", "leave it out")
        return torch.isin(self.source.labels, torch.tensor(classes)).nonzero().flatten().tolist()

    def _chosen(self, network: Network) -> list[str]:
        """The measures in the features of a network. Raises UsageError for one that needs pictures where there are statistics alone."""
        asked = self.config.measures
        names = [name for name in asked or network.measures if MEASURES[name].fits(type(network))]
        refused = [name for name in names if MEASURES[name].needs > self.has]
        if asked and refused:
            said = f"--data {self.config.data}: statistics, of which {refused[0]} cannot be made: it needs the pictures"
            said = said if self.has else f"measures {refused[0]}: measured against real pictures, and none are given"
            raise UsageError(said, "measures=frechet, or --data FOLDER" if self.has else "--data FOLDER")
        return [name for name in names if name not in refused]

    def _published(self, network: Network) -> tuple[Statistics | None, str]:
        """The statistics of a network in the file that --data names, and what they are, in words.

        guided-diffusion's files hold some pictures beside the statistics of all: those are for the measures that need pictures.
        """
        path, given = Path(self.config.data), self.has is Needs.STATISTICS
        holds = given or (isinstance(self.source, File) and self.positions is None and statistics.holds(path)[0])
        return statistics.read(path, network) if holds and (given or statistics.width(path) == network.width) else (None, "")

    def _reference(self, network: Network) -> tuple[Reference, str]:
        """What a network sees of the real pictures, or the statistics in their file; and what that is, in words."""
        config, (found, said) = self.config, self.published[network]
        if self.source is None and found is None:
            return Reference(None, None, config.neighbours), "none"
        if self.source is None:
            return Reference(None, found, config.neighbours), f"{said}; they give the {network.distance} alone"
        saw = seen(network, self.source, self.job, self.where)
        if self.positions is not None:
            saw = saw[torch.tensor(self.positions, dtype=torch.long)]
        which = "all" if config.classes is None else f"of classes {', '.join(map(str, config.classes))} the"
        drawn = f", what is random in them drawn with seed {REFERENCE_SEED}"
        text = f"{which} {len(saw)} images of {config.data}, each once{drawn}"
        return Reference(saw, found, config.neighbours), text + (f"; {network.distance} against {said}" if said else "")

    def _protocol(self, network: Network) -> str:
        """How a network's scores are made, in words."""
        reference, about = self.references[network], network.about
        if "kid" in self.chosen[network]:
            size = self.config.kid_subset_size or f"at most {subset(len(reference.seen), len(reference.seen), self.config)}"
            about += f"; KID over {self.config.kid_subsets} subsets of {size}"
        return about

    def save_statistics(self, path: Path) -> None:
        """Write mean and covariance of the real pictures' features to a file."""
        network = self.networks[0]
        reference = self.references[network]
        statistics.write(path, reference.statistics, network, len(reference.seen))

    def measure(self, source: Source) -> dict[str, float | None]:
        out: dict[str, float | None] = {}
        for network in self.networks:
            saw = seen(network, source, self.job, self.where)
            out |= self._scores(network, saw)
        return out

    def judged(self, source: Source) -> tuple[dict[str, float | None], list[Lowest]]:
        out, more, scores = judged(self.config.attributes, source, partial(self.asked, source), self.where)
        self.columns = self.columns | more
        return out, [*self._certain(source), *scores]

    def _certain(self, source: Source) -> list[Lowest]:
        """How certain the classifier is that each picture is of the class that was asked for; [] where accuracy is not measured."""
        for network, names in self.chosen.items():
            if "accuracy" in names and source.labels is not None:
                saw = seen(network, source, self.job, self.where)  # kept: nothing is computed
                assert saw.logits is not None
                return [("probability of the class", saw.logits.softmax(1).gather(1, source.labels[:, None])[:, 0])]
        return []

    def _scores(self, network: Network, saw: Seen) -> dict[str, float | None]:
        """The scores of pictures that a network saw. Processes share the measures, and all return the whole."""
        names, real = self.chosen[network], self.references[network]
        mine = [(k, MEASURES[names[k]].of(network, real, saw, self.config)) for k in processes.mine(len(names))]
        return {key: value for _, scores in sorted(launch.all_of(mine, self.where), key=itemgetter(0)) for key, value in scores.items()}

    def again(self, count: int) -> tuple[dict[str, float | None], Tensor] | None:
        if self.source is None:
            return None
        among = self.positions or range(len(self.source))
        chosen = (Draws(AGAIN_SEED, range(count)).uniform("order") * len(among)).long()
        if isinstance(self.source, Drawn):  # what is random in them is drawn anew
            anew = Drawn(self.source.images, [among[i] for i in chosen.tolist()], AGAIN_SEED)
            return self.measure(anew), anew.batch(range(min(count, SHOWN)))
        scores: dict[str, float | None] = {}
        for network in self.networks:
            scores |= self._scores(network, self.references[network].seen[chosen])
        return scores, self.source.batch(range(min(count, SHOWN, len(self.source))))

    def refuse(self, spec: str, count: int, shape: tuple[int, ...]) -> None:
        super().refuse(spec, count, shape)
        self._refuse_subset(f"--model {spec} has", count)

    def title(self, row: dict[str, Any]) -> str:
        """The title of a model's pictures in picture.png."""
        numbers = [
            f"{network.distance[0].upper()}{network.distance[1:]} {row[network.prefix + 'frechet']:.3f}"
            for network, names in self.chosen.items()
            if "frechet" in names
        ]
        if row.get("accuracy") is not None:
            numbers.append(f"accuracy {row['accuracy']:.3f}")
        if row["network_evaluations"]:
            numbers.append(f"{row['network_evaluations']} network evaluations")
        return f"{row['model']}: {', '.join(numbers)}"

    def warnings(self, row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
        """Warnings that a Fréchet distance is of too few images, or against too few."""
        said = []
        for network, names in self.chosen.items():
            key, width = f"{network.prefix}frechet", network.width
            count = min(row["images"], self._count() or row["images"])
            if row["model"] == AGAIN or count >= ENOUGH * width or "frechet" not in names:
                continue
            what = "a Fréchet distance" if network.distance == "frechet" else f"an {network.distance}"
            why = "their covariance is singular" if count <= width else f"fewer than {ENOUGH} a feature"
            floor = [r[key] for r in rows if r["model"] == AGAIN and r["images"] == row["images"]]
            scale = (
                f"real images in that number get {what} of {floor[0]:.3g}, the model's" if floor else f"{what} of so few is too large: it"
            )
            images = f"{count} {'real ' * (count < row['images'])}images for {width} features"
            said.append(f"{row['model']}: {images}, {why}: {scale} is {row[key]:.3g}; take more (--num, with another --out)")
        return said


def statistics_of(network: Network, images: Images, classes: list[int] | None, where: torch.device) -> Statistics:
    """Mean and covariance of a set's features, of some classes or of all; nothing is kept on disk."""
    source = Drawn(images, range(len(images)), REFERENCE_SEED)
    network.check(source.shape, source.classes, str(images.about))
    features = compute(network, source, range(len(source)), where)["features"]
    if classes is not None and source.labels is not None:
        features = features[torch.isin(source.labels, torch.tensor(classes))]
    return Statistics.of(features)
