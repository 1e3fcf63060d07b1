def shutdown(processes, timeout=None):
    pass
