class WorkerBase:
    def __init__(self):
        pass
