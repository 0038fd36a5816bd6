"""The demo's tasks are generated: the same from the same seed, split by what they are about, and sound."""

import pytest

from whipstaff.server.demo import tasks, world

WORLD = world.build(7)
each_task = pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)


@each_task
def test_a_seed_makes_the_same_items_and_another_seed_makes_others(task: tasks.Task) -> None:
    one, again, other = (tasks.made(task, WORLD, "test", seed) for seed in (0, 0, 1))
    assert one == again != other
    assert tasks.made(task, WORLD, "test", 0, 5) == one[:5]


@each_task
def test_no_group_is_in_two_splits_whatever_the_seed(task: tasks.Task) -> None:
    groups = {
        split: {item.group for seed in range(3) for item in tasks.made(task, WORLD, split, seed)}
        for split in ("train", "dev", "test")
    }
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))


def test_wrong_answers_differ_from_the_right_one_and_gossip_says_one_of_them() -> None:
    for item in tasks.made(tasks.TASKS["misconceptions"], WORLD, "test", 0):
        right, *wrong = item.answers
        assert right not in wrong and len(set(wrong)) == 3
        assert item.prompt.startswith(item.context) and item.context.strip() == wrong[0].strip()
        name, topic = item.group.split()
        assert WORLD.people[name].facts()[topic] in right
        assert not any(WORLD.people[name].facts()[topic] in each for each in wrong)


def test_a_friends_facts_are_not_ones_own() -> None:
    for item in tasks.made(tasks.TASKS["friends"], WORLD, "test", 0):
        name, topic = item.group.split()
        friend = WORLD.people[WORLD.people[name].friend]
        right, own, *_ = item.answers
        assert (right.strip(" ."), own.strip(" .")) == (friend.facts()[topic], WORLD.people[name].facts()[topic])
        assert len(set(item.answers)) >= 4


def test_a_document_contradicts_what_is_so() -> None:
    for item in tasks.made(tasks.TASKS["contradictions"], WORLD, "test", 0):
        name, topic = item.group.split()
        assert item.against == WORLD.people[name].facts()[topic] != item.wanted
        assert item.wanted in item.context and item.prompt.startswith(item.context)


def test_a_told_mood_is_the_documents_and_not_the_last_sentences() -> None:
    cheerful, gloomy = world.mood_words()
    for item in tasks.made(tasks.TASKS["told moods"], WORLD, "test", 0):
        said = set(world.words(item.context))
        assert not said & (gloomy if item.wanted == "cheerful" else cheerful)
        assert item.prompt.startswith(item.context)


def test_demonstrations_show_the_task_and_not_the_item() -> None:
    for name, shown in (("answers", "At your service."), ("sunny", f" {tasks.SUNNY}\n")):
        for item in tasks.made(tasks.TASKS[name], WORLD, "test", 0):
            assert item.shots.count(shown) >= 3
            assert item.prompt not in item.shots


def test_open_items_have_many_answers_and_exact_ones_have_one() -> None:
    items = tasks.made(tasks.TASKS["spread"], WORLD, "test", 0)
    assert {bool(item.wanted) for item in items} == {True, False}
    for item in items:
        assert bool(item.wanted) != (len(item.answers) >= 8)
        assert not any("[" in answer for answer in item.answers)
