"""What methods that train on their own rollouts share, `align` and `edit`: rollouts, schedules, advantages, losses."""
