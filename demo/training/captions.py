"""The words for a scene: several orders and synonyms, so that free typing works."""

from training.pictures import PLACE_PAIRS

_SIZES = {
    "small": ("small", "small", "small", "tiny", "little"),
    "medium": ("medium", "medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "large", "big", "big", "huge"),
}
_SHAPES = {
    "circle": ("circle", "circle", "circle", "disc"),
    "ring": ("ring", "ring", "ring", "donut"),
    "cross": ("cross", "cross", "cross", "plus sign"),
    "square": ("square", "square", "square", "box"),
}
_CORNERS = ("top left", "top right", "bottom left", "bottom right")


def _with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _place(rng, place):
    """The place as words after "in", "at" or a comma."""
    if place == "center":
        return rng.choice(("in the center", "in the center", "in the middle", "at the center"))
    words = place
    if place in _CORNERS:
        if rng.random() < 0.25:
            words = words.replace("top", "upper").replace("bottom", "lower")
        words += rng.choice(("", "", " corner"))
        return rng.choice(("in the ", "in the ", "at the ")) + words
    if place in ("left", "right"):
        return rng.choice(("on the ", "on the ", "at the ")) + words + rng.choice(("", "", " side"))
    return rng.choice(("at the ", "at the ", "in the ")) + words


def _thing(rng, thing, drop):
    words = [] if rng.random() < drop else [rng.choice(_SIZES[thing.size])]
    if rng.random() >= drop / 3:
        words.append(thing.color)
    words.append(rng.choice(_SHAPES.get(thing.shape, (thing.shape,))))
    return " ".join(words)


def _relation(rng, scene):
    """Both things and where they stand."""
    first, second = (_with_article(_thing(rng, thing, 0.08)) for thing in scene.things)
    places = tuple(thing.place for thing in scene.things)
    if rng.random() < 0.3 and places == PLACE_PAIRS[0]:
        return rng.choice((f"{first} to the left of {second}", f"{second} to the right of {first}"))
    if rng.random() < 0.3 and places == PLACE_PAIRS[1]:
        return rng.choice((f"{first} above {second}", f"{second} below {first}"))
    phrases = [f"{words} {_place(rng, place)}" for words, place in zip((first, second), places)]
    if rng.random() < 0.5:
        phrases.reverse()
    return rng.choice((" and ", " and ", ", ")).join(phrases)


def caption(scene, rng, complete=False):
    """A caption for the scene; unless `complete`, some attributes may go unmentioned."""
    drop = 0.0 if complete else 0.12
    background = scene.background + rng.choice((" background", " background", " background", " ground"))
    if len(scene.things) == 2:
        if complete:
            # The relation drops words by itself; draw again until all are there.
            while True:
                things = _relation(rng, scene)
                if _mentions_everything(things, scene):
                    break
        else:
            things = _relation(rng, scene)
    else:
        (thing,) = scene.things
        things = _with_article(_thing(rng, thing, drop))
        if rng.random() >= drop:
            things += rng.choice((" ", " ", ", ")) + _place(rng, thing.place)
    if not complete and rng.random() < 0.05:
        return things
    forms = [f"{things} on {_with_article(background)}"] * 4
    forms += [f"{things}, {background}", f"{things}, on {_with_article(background)}"]
    forms += [f"on {_with_article(background)}, {things}", f"{_with_article(background)} with {things}"]
    forms += [f"a picture of {things} on {_with_article(background)}"]
    return rng.choice(forms)


def _mentions_everything(words, scene):
    sizes = [size for thing in scene.things for size in set(_SIZES[thing.size])]
    counted = sum(words.split().count(size) for size in set(sizes))
    return counted == 2 and all(thing.color in words for thing in scene.things)
