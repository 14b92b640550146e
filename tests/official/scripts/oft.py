"""A LIBERO evaluation with the imports, the configuration and the loop of openvla-oft's own, written for the tests."""

import argparse
from collections import deque

import numpy as np
from experiments.robot.libero.libero_utils import (
    get_libero_dummy_action,
    get_libero_env,
    get_libero_image,
    get_libero_wrist_image,
    quat2axisangle,
    save_rollout_video,
)
from experiments.robot.openvla_utils import (
    get_action_head,
    get_noisy_action_projector,
    get_processor,
    get_proprio_projector,
    resize_image_for_policy,
)
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
from prismatic.vla.constants import NUM_ACTIONS_CHUNK


def initialize(cfg):
    model = get_model(cfg)
    heads = {"proprio_projector": None, "action_head": None, "noisy_action_projector": None}
    if cfg.use_proprio:
        heads["proprio_projector"] = get_proprio_projector(cfg, model.llm_dim, proprio_dim=8)
    if cfg.use_l1_regression or cfg.use_diffusion:
        heads["action_head"] = get_action_head(cfg, model.llm_dim)
    if cfg.use_diffusion:
        heads["noisy_action_projector"] = get_noisy_action_projector(cfg, model.llm_dim)
    cfg.unnorm_key = cfg.task_suite_name
    if f"{cfg.unnorm_key}_no_noops" in model.norm_stats:
        cfg.unnorm_key = f"{cfg.unnorm_key}_no_noops"
    assert cfg.unnorm_key in model.norm_stats
    return model, heads, get_processor(cfg)


def prepare(obs, size):
    images = get_libero_image(obs), get_libero_wrist_image(obs)
    front, wrist = (resize_image_for_policy(image, size) for image in images)
    state = (obs["robot0_eef_pos"], quat2axisangle(obs["robot0_eef_quat"]), obs["robot0_gripper_qpos"])
    return {"full_image": front, "wrist_image": wrist, "state": np.concatenate(state)}, images[0]


def run_episode(cfg, env, description, model, size, processor, heads, initial_state):
    env.reset()
    obs = env.set_init_state(initial_state)
    if cfg.num_open_loop_steps != NUM_ACTIONS_CHUNK:
        print("WARNING: the whole chunk should be carried out")
    queue = deque(maxlen=cfg.num_open_loop_steps)
    t, success, replay = 0, False, []
    try:
        while t < cfg.max_steps + cfg.num_steps_wait:
            if t < cfg.num_steps_wait:
                obs, _, _, _ = env.step(get_libero_dummy_action(cfg.model_family))
                t += 1
                continue
            observation, image = prepare(obs, size)
            replay.append(image)
            if not queue:
                queue.extend(
                    get_action(
                        cfg, model, observation, description, processor=processor, **heads, use_film=cfg.use_film
                    )
                )
            action = invert_gripper_action(normalize_gripper_action(queue.popleft(), binarize=True))
            obs, _, done, _ = env.step(action.tolist())
            if done:
                success = True
                break
            t += 1
    except Exception as error:
        print(f"Episode error: {error}")
    return success, replay


def evaluate(cfg):
    set_seed_everywhere(cfg.seed)
    model, heads, processor = initialize(cfg)
    size = get_image_resize_size(cfg)
    suite = benchmark.get_benchmark_dict()[cfg.task_suite_name]()
    print(f"{DATE_TIME}: {cfg.task_suite_name}")
    states = suite.get_task_init_states(0)
    env, description = get_libero_env(suite.get_task(0), cfg.model_family, resolution=cfg.env_img_res)
    for episode in range(cfg.num_trials_per_task):
        success, replay = run_episode(cfg, env, description, model, size, processor, heads, states[episode])
        save_rollout_video(replay, episode + 1, success=success, task_description=description)
        print(f"Success: {success}")


def yes(text):
    return text == "True"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_family", default="openvla")
    parser.add_argument("--pretrained_checkpoint", default="")
    parser.add_argument("--use_l1_regression", type=yes, default=True)
    parser.add_argument("--use_diffusion", type=yes, default=False)
    parser.add_argument("--num_diffusion_steps_inference", type=int, default=50)
    parser.add_argument("--use_film", type=yes, default=False)
    parser.add_argument("--num_images_in_input", type=int, default=2)
    parser.add_argument("--use_proprio", type=yes, default=True)
    parser.add_argument("--center_crop", type=yes, default=True)
    parser.add_argument("--num_open_loop_steps", type=int, default=8)
    parser.add_argument("--load_in_8bit", type=yes, default=False)
    parser.add_argument("--load_in_4bit", type=yes, default=False)
    parser.add_argument("--task_suite_name", default="libero_object")
    parser.add_argument("--num_steps_wait", type=int, default=2)
    parser.add_argument("--num_trials_per_task", type=int, default=1)
    parser.add_argument("--env_img_res", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=36)
    parser.add_argument("--seed", type=int, default=7)
    evaluate(parser.parse_args())
