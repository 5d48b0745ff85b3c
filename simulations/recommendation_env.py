"""A world as a Gymnasium environment, so that other people's agents run in it.

An episode is one user, drawn anew, and `horizon` slates. The agent sees what she was shown and liked, never her taste.
Needs the extra: pip install 'fedtopk[environment]'.
"""

from typing import Any, Literal

import numpy as np

from common.errors import MissingDependency
from simulations.actors import HORIZON, REACH, fit_of, observation, remembered
from simulations.environment import World, choose, lowest, require

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    hint = "pip install 'fedtopk[environment]'"
    raise MissingDependency(f"Expected gymnasium to make a world an environment ({hint}): {error}.") from None


class RecommendationEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Show slates to one user after another.

    Observations are (2f+1,) float32 in [−REACH, REACH]: decayed sums of the characters that she looked at and did not
    like, and of those that she liked, and the share of the episode that is over. The reward is 1 if she consumed an
    item, else 0. Episodes are truncated after `horizon` steps and never terminate. The info holds the user's number,
    the slate without repetitions, and the position consumed or −1.

    Args:
        action: `proto`: (f+1,) in [−1, 1], and the slate is the items that fit it best (see :func:`fit_of`);
            `slate`: the items themselves; one that is repeated counts where it stands first.
        slate_size: K, the items shown at once.
        horizon: steps per episode.
        pace: days between steps, in which tastes drift.

    Raises:
        SettingsError: an argument is out of range.
    """

    _memory: np.ndarray

    def __init__(
        self,
        world: World,
        *,
        action: Literal["proto", "slate"] = "proto",
        slate_size: int = 1,
        horizon: int = HORIZON,
        pace: float = 0.0,
    ) -> None:
        require(1 <= slate_size <= world.items, f"slate_size={slate_size} in [1, {world.items}]")
        require(horizon >= 1, f"horizon={horizon} ≥ 1")
        require(pace >= 0, f"pace={pace:g} ≥ 0")
        factors = world.characters.shape[1]
        self.observation_space = spaces.Box(-REACH, REACH, (2 * factors + 1,), np.float32)
        self.action_space: spaces.Space[np.ndarray] = (
            spaces.Box(-1, 1, (factors + 1,), np.float32)
            if action == "proto"
            else spaces.MultiDiscrete([world.items] * slate_size)
        )
        self._world, self._slate_size, self._horizon, self._pace = world, slate_size, horizon, pace
        self._by_proto = action == "proto"
        self._begin(user=0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._begin(int(self.np_random.integers(self._world.users)))
        return self._observation(), {"user": self._user}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        slate = self._slate(action)
        likes = self._world.likes_of(np.array([self._user]), slate, self._pace * self._steps)
        position = int(choose(likes, self.np_random)[0])
        for place, item in enumerate(slate[: position + 1] if position >= 0 else slate):
            characters = self._world.characters[None, item]
            self._memory = remembered(self._memory, characters, np.array([place == position]))
        self._steps += 1
        info = {"user": self._user, "slate": slate, "position": position}
        return self._observation(), float(position >= 0), False, self._steps >= self._horizon, info

    def _begin(self, user: int) -> None:
        self._user, self._steps = user, 0
        self._memory = np.zeros((1, 2, self._world.characters.shape[1]), np.float32)

    def _slate(self, action: np.ndarray) -> np.ndarray:
        if self._by_proto:
            slate: np.ndarray = lowest(-fit_of(self._world, action[None]), self._slate_size)[0]
            return slate
        return np.array(list(dict.fromkeys(action.tolist())))

    def _observation(self) -> np.ndarray:
        clock = min(self._steps / self._horizon, 1)
        seen: np.ndarray = observation(self._memory, np.array([clock]))[0]
        return seen
