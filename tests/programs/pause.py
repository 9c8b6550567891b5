"""Lives long enough for the agent to get to know its interpreter."""
import time

time.sleep(0.5)
