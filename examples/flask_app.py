"""Flask and RQ with jobguard.

Start the app:   flask --app examples/flask_app.py run
Start a worker:  rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Send a job:      curl -X POST 'localhost:5000/mail?address=ada@example.org'
"""

from flask import Flask, request
from rq_app import queue
from rq_tasks import send_mail

app = Flask("shop")


@app.post("/mail")
def mail() -> dict[str, str]:
    """Enqueue one mail. The job is recorded before the response goes out."""
    return {"id": queue.enqueue(send_mail, request.args["address"]).id}


if __name__ == "__main__":
    sent = app.test_client().post("/mail", query_string={"address": "ada@example.org"})
    print("sent", sent.json["id"] if sent.json else sent.status)
