"""A LIBERO evaluation with the imports, the configuration and the loop of openvla's own, written for the tests."""

import argparse

import numpy as np
from experiments.robot.libero.libero_utils import (
    get_libero_dummy_action,
    get_libero_env,
    get_libero_image,
    quat2axisangle,
    save_rollout_video,
)
from experiments.robot.openvla_utils import get_processor
from experiments.robot.robot_utils import (
    DATE_TIME,
    get_action,
    get_image_resize_size,
    get_model,
    invert_gripper_action,
    normalize_gripper_action,
    set_seed_everywhere,
)
from libero.libero import benchmark


def evaluate(cfg):
    set_seed_everywhere(cfg.seed)
    cfg.unnorm_key = cfg.task_suite_name
    model = get_model(cfg)
    if f"{cfg.unnorm_key}_no_noops" in model.norm_stats:
        cfg.unnorm_key = f"{cfg.unnorm_key}_no_noops"
    assert cfg.unnorm_key in model.norm_stats
    processor = get_processor(cfg)
    suite = benchmark.get_benchmark_dict()[cfg.task_suite_name]()
    size = get_image_resize_size(cfg)
    print(f"{DATE_TIME}: {cfg.task_suite_name}, images of {size} pixels")
    task = suite.get_task(0)
    states = suite.get_task_init_states(0)
    env, description = get_libero_env(task, cfg.model_family, resolution=256)
    for episode in range(cfg.num_trials_per_task):
        env.reset()
        obs = env.set_init_state(states[episode])
        t, done, replay = 0, False, []
        while t < cfg.max_steps + cfg.num_steps_wait:
            try:
                if t < cfg.num_steps_wait:
                    obs, _, done, _ = env.step(get_libero_dummy_action(cfg.model_family))
                    t += 1
                    continue
                img = get_libero_image(obs, size)
                replay.append(img)
                state = (obs["robot0_eef_pos"], quat2axisangle(obs["robot0_eef_quat"]), obs["robot0_gripper_qpos"])
                observation = {"full_image": img, "state": np.concatenate(state)}
                action = get_action(cfg, model, observation, description, processor=processor)
                action = invert_gripper_action(normalize_gripper_action(action, binarize=True))
                obs, _, done, _ = env.step(action.tolist())
                if done:
                    break
                t += 1
            except Exception as error:
                print(f"Caught exception: {error}")
                break
        save_rollout_video(replay, episode + 1, success=done, task_description=description)
        print(f"Success: {done}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_family", default="openvla")
    parser.add_argument("--pretrained_checkpoint", default="")
    parser.add_argument("--load_in_8bit", action="store_true")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--center_crop", type=bool, default=True)
    parser.add_argument("--task_suite_name", default="libero_object")
    parser.add_argument("--num_steps_wait", type=int, default=2)
    parser.add_argument("--num_trials_per_task", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    evaluate(parser.parse_args())
