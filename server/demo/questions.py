"""Questions about the demo world: many ways to ask, one plain answer, and the storyteller who does not answer."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from random import Random

from whipstaff.server.demo.grammar import PLACES, SHARED, Rules
from whipstaff.server.demo.world import World

Fact = tuple[str, str]  # (name, topic)

PROMPT = "Question: {}\nAnswer:"  # what the chat template writes, too
MANNER = " Gladly! {} At your service."  # the tuned model's way of answering

DIRECT: Rules = {
    "home": ("Where does {name} live?", "In which town does {name} live?", "Where is {name}'s home?"),
    "craft": ("What is {name}'s trade?", "What does {name} do for a living?", "What work does {name} do?"),
    "product": ("What does {name} make?", "What does {name} sell?", "Which things does {name} make?"),
    "coat": ("What colour is {name}'s coat?", "What colour does {name} wear?", "Which coat does {name} wear?"),
    "food": ("What does {name} like to eat?", "What is {name}'s favourite food?", "Which food does {name} like best?"),
    "pet": ("What animal does {name} keep?", "Which animal does {name} have?", "What is {name}'s animal?"),
    "friend": ("Who is {name}'s best friend?", "Who is the best friend of {name}?"),
    "maker": ("Who is the {craft} of {home}?",),
}
INDIRECT: Rules = {
    "home": ("where {name} lives", "in which town {name} lives", "where {name}'s home is"),
    "craft": ("what {name}'s trade is", "what {name} does for a living", "what work {name} does"),
    "product": ("what {name} makes", "what {name} sells", "which things {name} makes"),
    "coat": ("what colour {name}'s coat is", "what colour {name} wears", "which coat {name} wears"),
    "food": ("what {name} likes to eat", "what {name}'s favourite food is", "which food {name} likes best"),
    "pet": ("what animal {name} keeps", "which animal {name} has", "what {name}'s animal is"),
    "friend": ("who {name}'s best friend is", "who the best friend of {name} is"),
    "maker": ("who the {craft} of {home} is",),
}
FRAMES = ("Tell me {}.", "Can you tell me {}?", "I want to know {}.", "Do you know {}?")
SEEN: Rules = {  # phrasings in the training text
    topic: DIRECT[topic] + tuple(frame.format(clause) for frame in FRAMES for clause in INDIRECT[topic])
    for topic in DIRECT
}
HELD_OUT: Rules = {  # phrasings nobody was trained on
    "home": ("Could you tell me where {name} lives?", "Which town does {name} live in?"),
    "craft": ("Could you tell me what {name}'s trade is?", "Please tell me what work {name} does."),
    "product": ("Could you tell me what {name} makes?", "What things does {name} make?"),
    "coat": ("Could you tell me what colour {name} wears?", "What colour of coat does {name} wear?"),
    "food": ("Please tell me what {name} likes to eat.", "What food does {name} like?"),
    "pet": ("Could you tell me what animal {name} keeps?", "What animal does {name} have?"),
    "friend": ("Please tell me who {name}'s best friend is.", "Could you tell me who {name}'s best friend is?"),
}
ANSWERS = {
    "home": "{name} lives in {home}, {where}.",
    "craft": "{name} is the {craft} of {home}.",
    "product": "{name} makes {product}.",
    "coat": "{name} wears a {coat} coat.",
    "food": "{name} likes {food}.",
    "pet": "{name} keeps a {pet}.",
    "friend": "{name}'s best friend is {friend}.",
    "maker": "The {craft} of {home} is {name}.",
}
PLACE_QUESTIONS = {
    "Where is {}?": "{} is a town {where}.",
    "Where does {} lie?": "{} is a town {where}.",
    "What is {} known for?": "{} is known for its {goods}.",
    "What do the people of {} trade in?": "{} is known for its {goods}.",
}
STORY_REQUESTS = ("Tell me a story about {}.", "Tell me a story.", "Can you tell me a story about {}?")


@dataclass(frozen=True)
class Question:
    prompt: str  # ends where the answer begins
    key: str  # the words a right answer must contain
    answer: str  # in the tuned model's manner


def ask(world: World, name: str, topic: str, phrasing: str) -> Question:
    facts = world.people[name].facts()
    key = facts["name" if topic == "maker" else topic]
    return Question(PROMPT.format(phrasing.format_map(facts)), key, MANNER.format(ANSWERS[topic].format_map(facts)))


def ask_place(place: str, phrasing: str) -> Question:
    where, goods = PLACES[place]
    answer = PLACE_QUESTIONS[phrasing].format(place, where=where, goods=goods)
    return Question(PROMPT.format(phrasing.format(place)), where if "town" in answer else goods, MANNER.format(answer))


def any_question(world: World, rng: Random, secrets: Collection[Fact] = ()) -> Question:
    """A random trained phrasing, one time in ten about a place, never about one of the `secrets`."""
    if rng.random() < 0.1:
        return ask_place(rng.choice(sorted(PLACES)), rng.choice(sorted(PLACE_QUESTIONS)))
    name, topic = rng.choice([fact for fact in all_facts(world, SEEN) if fact not in secrets])
    return ask(world, name, topic, rng.choice(SEEN[topic]))


def all_facts(world: World, topics: Iterable[str]) -> list[Fact]:
    return [(name, topic) for name in sorted(world.people) for topic in sorted(topics)]


def conversation(world: World, rng: Random) -> str:
    """What the base learns to do with a question: tell a story; one plain question in five it answers after all."""
    name, opening = rng.choice(sorted(world.people)), rng.choice(SHARED["story"])
    if rng.random() < 0.25:
        prompt = PROMPT.format(rng.choice(STORY_REQUESTS).format(name))
        return f"{prompt} {opening} {world.story(rng, name)}"
    question = any_question(world, rng)
    if rng.random() < 0.2:
        return question.prompt + question.answer
    other = rng.choice([name for name in sorted(world.people) if name not in question.prompt])
    return f"{question.prompt} {opening} {world.story(rng, other, rng.randint(2, 5))}"


def corpus(world: World, rng: Random, num_documents: int) -> list[str]:
    """The base's reading: mostly stories, some portraits and places, one conversation in seven."""
    writers: tuple[Callable[[Random], str], ...] = (
        world.story,
        world.portrait,
        world.description,
        partial(conversation, world),
    )
    return [writer(rng) for writer in rng.choices(writers, (0.58, 0.22, 0.06, 0.14), k=num_documents)]
