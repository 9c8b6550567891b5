//! Arming: the thread that answers waiting processes.
