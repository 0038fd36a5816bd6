"""The demo world: people and places with fixed facts, and a narrator who tells of them in changing moods."""

import re
from dataclasses import dataclass
from random import Random

from whipstaff.server.demo.grammar import (
    CHEERFUL,
    COLOURS,
    CRAFTS,
    FACTS,
    FOODS,
    GLOOMY,
    MEN,
    PETS,
    PLACE_FACTS,
    PLACES,
    SHARED,
    WOMEN,
    Rules,
)

MOODS: dict[str, Rules] = {"cheerful": CHEERFUL, "gloomy": GLOOMY}
SYMBOL = re.compile(r"\[(\w+)\]")
SLOT = re.compile(r"\[\w+\]|\{\w+\}")
WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Person:
    name: str
    is_woman: bool
    home: str
    craft: str
    coat: str
    food: str
    pet: str
    friend: str

    def facts(self) -> dict[str, str]:
        """Everything a question can ask for; the keys are the fields of the sentence tables."""
        product, material, tool = CRAFTS[self.craft]
        return {
            "name": self.name,
            "home": self.home,
            "where": PLACES[self.home][0],
            "craft": self.craft,
            "product": product,
            "material": material,
            "tool": tool,
            "coat": self.coat,
            "food": self.food,
            "pet": self.pet,
            "friend": self.friend,
        }


@dataclass(frozen=True)
class World:
    people: dict[str, Person]

    def story(self, rng: Random, name: str | None = None, num_sentences: int | None = None) -> str:
        """A paragraph about one person: facts, scenes and mood. The mood starts at random and turns now and then."""
        person = self.people[name or rng.choice(sorted(self.people))]
        decks = {kind: rng.sample(SHARED[kind], len(SHARED[kind])) for kind in ("scene", "turn")}
        decks["fact"] = [rng.choice(FACTS[topic]) for topic in rng.sample(sorted(FACTS), len(FACTS))]
        mood = rng.choice(sorted(MOODS))
        sentences: list[str] = []
        for _ in range(num_sentences or rng.randint(5, 12)):
            kind = rng.choices(("fact", "scene", "turn"), (0.2, 0.1, 0.7))[0]
            told = " ".join(sentences)
            named = person.name not in told or rng.random() < 0.6
            sentence = self.sentence((decks[kind] or decks["turn"]).pop(), person, mood, rng, named)
            if " ".join(sentence.split()[-3:]) not in told:  # no phrase twice
                sentences.append(sentence)
            if rng.random() < 0.1:
                mood = rng.choice(sorted(MOODS))
        return " ".join(sentences)

    def sentence(self, pattern: str, person: Person, mood: str, rng: Random, named: bool = True) -> str:
        """Fill one pattern; `named` says the name, otherwise he or she."""
        text = expand(pattern, SHARED | MOODS[mood], rng)
        friend = self.people[person.friend]
        place = rng.choice([p for p in sorted(PLACES) if p != person.home])
        they, their = ("she", "her") if person.is_woman else ("he", "his")
        fields = person.facts() | {
            "who": person.name if named else they,
            "Who": person.name if named else they.capitalize(),
            "Whose": person.name + "'s" if named else their.capitalize(),
            "place": place,
            "goods": PLACES[place][1],
            "friend_home": friend.home,
            "friend_food": friend.food,
        }
        return text.format_map(fields)

    def portrait(self, rng: Random) -> str:
        """All facts about one person, in any order, and one thing that happened."""
        person = rng.choice(list(self.people.values()))
        patterns = [rng.choice(FACTS[topic]) for topic in rng.sample(sorted(FACTS), len(FACTS))]
        patterns.append(rng.choice(SHARED["turn"]))
        mood = rng.choice(sorted(MOODS))
        named = (i == 0 or rng.random() < 0.6 for i in range(len(patterns)))
        return " ".join(self.sentence(pattern, person, mood, rng, next(named)) for pattern in patterns)

    def description(self, rng: Random) -> str:
        """A paragraph about one place, then somebody who lives there."""
        place = rng.choice(sorted(PLACES))
        fields = {"place": place, "lies": PLACES[place][0], "goods": PLACES[place][1]}
        facts = [rng.choice(PLACE_FACTS[topic]).format_map(fields) for topic in ("where", "goods")]
        residents = [p.name for p in self.people.values() if p.home == place]
        return " ".join([*facts, self.story(rng, rng.choice(residents), rng.randint(2, 6))])


def build(seed: int) -> World:
    """Deal the facts: two people to a town, at most two to a craft and never both in the same town."""
    rng = Random(seed)
    names = rng.sample(WOMEN + MEN, len(WOMEN) + len(MEN))
    homes, crafts = list(PLACES) * 2, list(CRAFTS) * 2
    coats, foods, pets = (rng.sample(things * 2, len(names)) for things in (COLOURS, FOODS, PETS))
    friends = names[1:] + names[:1]
    deal = zip(names, homes, crafts, coats, foods, pets, friends, strict=False)
    people = [Person(name, name in WOMEN, *facts) for name, *facts in deal]
    return World({person.name: person for person in sorted(people, key=lambda p: p.name)})


def expand(pattern: str, rules: Rules, rng: Random) -> str:
    """Replace [symbols], also those inside replacements, until none is left."""
    while match := SYMBOL.search(pattern):
        pattern = pattern[: match.start()] + rng.choice(rules[match[1]]) + pattern[match.end() :]
    return pattern


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def mood_words() -> tuple[frozenset[str], frozenset[str]]:
    """Words of four letters or more that only cheerful, and only gloomy, sentences use."""
    things: Rules = {"things": (*FOODS, *PETS, *map(" ".join, CRAFTS.values()), *map(" ".join, PLACES.values()))}
    neutral = _words_of(SHARED | FACTS | PLACE_FACTS | things)
    cheerful, gloomy = _words_of(CHEERFUL) - neutral, _words_of(GLOOMY) - neutral
    return frozenset(cheerful - gloomy), frozenset(gloomy - cheerful)


def _words_of(rules: Rules) -> set[str]:
    return {word for rows in rules.values() for row in rows for word in words(SLOT.sub(" ", row)) if len(word) > 3}
