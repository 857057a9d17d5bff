"""A stand-in for the Hub's HTTP API on 127.0.0.1, enough of it for huggingface_hub to create, push to and load from.

Repositories live in memory. `WRITER` is a token that may write below `me/`; private repositories answer it alone.
`hub.interfere['PUT'] = function` takes one request of that method over, as `cut_upload` and `cut_download` do.
"""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER = 'hf_writer'


class Repo:
    def __init__(self, private):
        self.private = private
        self.commits = {'0' * 40: {}}  # commit: {path: content}
        self.branches = {'main': '0' * 40}
        self.lfs = set()  # paths kept as LFS

    def commit(self, branch, files):
        tree = {**self.commits[self.branches[branch]], **files}
        sums = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in tree.items())
        oid = hashlib.sha1(json.dumps([len(self.commits), sums]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        return oid

    def files(self, revision='main'):
        return self.commits[self.branches[revision]]

    def oid(self, path, content):
        return hashlib.sha256(content).hexdigest() if path in self.lfs else git_oid(content)


def git_oid(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Has its address from the start; it listens there from the first `reset` on."""
    daemon_threads = True
    thread = None

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler, bind_and_activate=False)
        self.server_bind()
        self.url = f'http://127.0.0.1:{self.server_port}'

    def reset(self):
        self.repos, self.objects, self.interfere, self.log = {}, {}, {}, []
        if self.thread is None:
            self.server_activate()
            self.thread = threading.Thread(target=self.serve_forever, daemon=True)
            self.thread.start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.log.append(f'{self.command} {path}')
        interfere = hub.interfere.pop(self.command, None)
        if interfere:
            return interfere(self)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return route(self, **match.groupdict())
        self.send(404)

    do_HEAD = do_GET = do_POST = do_PUT = answer

    def send(self, status=200, content=b'', **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(content), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def is_writer(self):
        return self.headers.get('Authorization') == f'Bearer {WRITER}'

    def may_write(self, owner):
        if not self.headers.get('Authorization'):
            self.send(401, {'error': 'Invalid username or password.'})
        elif not self.is_writer():
            self.send(401, {'error': 'Invalid user token.'})
        elif owner != 'me':
            self.send(403, {'error': f'You don\'t have the rights to create a model under the namespace "{owner}".'})
        else:
            return True

    def find(self, repo_id, revision=None):
        """The repository and the commit, or None after an answer that says what is missing."""
        repo = self.server.repos.get(repo_id)
        if repo is None or repo.private and not self.is_writer():
            self.send(401, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
            return None, None
        commit = repo.branches.get(revision, revision if revision in repo.commits else None)
        if revision is not None and commit is None:
            self.send(404, {'error': f'Invalid rev id: {revision}'}, X_Error_Code='RevisionNotFound')
            return None, None
        return repo, commit

    def create(self):
        wanted = json.loads(self.body)
        owner, repo_id = wanted['organization'], f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(owner):
            return
        is_new = repo_id not in self.server.repos
        if is_new:
            self.server.repos[repo_id] = Repo(wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        self.send(200 if is_new else 409, {'url': f'{self.server.url}/{repo_id}'})

    def info(self, repo_id, revision='main'):
        repo, commit = self.find(repo_id, revision)
        if repo:
            siblings = [{'rfilename': path} for path in repo.commits[commit]]
            self.send(content={'id': repo_id, 'sha': commit, 'private': repo.private, 'siblings': siblings})

    def branch(self, repo_id, revision):
        repo, _ = self.find(repo_id)
        if repo and self.may_write(repo_id.split('/')[0]):
            is_new = revision not in repo.branches
            repo.branches.setdefault(revision, repo.branches['main'])
            self.send(200 if is_new else 409, {})

    def validate(self):
        self.send(content={'errors': [], 'warnings': []})

    def preupload(self, repo_id, revision):
        repo, commit = self.find(repo_id, revision)
        if not repo:
            return
        files = []
        for path in (file['path'] for file in json.loads(self.body)['files']):
            is_lfs = path.endswith(('.safetensors', '.bin', '.png'))
            repo.lfs |= {path} if is_lfs else set()
            old = repo.commits[commit].get(path)
            files.append(dict(
                path=path, uploadMode='lfs' if is_lfs else 'regular', shouldIgnore=False,
                oid=None if old is None else repo.oid(path, old)))
        self.send(content={'files': files, 'commitOid': commit})

    def lfs_batch(self, repo_id):
        if self.may_write(repo_id.split('/')[0]):
            objects = json.loads(self.body)['objects']
            for item in objects:
                if item['oid'] not in self.server.objects:
                    item['actions'] = {'upload': {'href': f"{self.server.url}/lfs/{item['oid']}"}}
            self.send(content={'transfer': 'basic', 'objects': objects}, Content_Type='application/vnd.git-lfs+json')

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {'error': 'The content does not have this sha256.'})
        self.server.objects[oid] = self.body
        self.send()

    def commit(self, repo_id, revision):
        repo, _ = self.find(repo_id, revision)
        if not (repo and self.may_write(repo_id.split('/')[0])):
            return
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.server.objects[value['oid']]
        oid = repo.commit(revision, files)
        self.send(content={'success': True, 'commitUrl': f'{self.server.url}/{repo_id}/commit/{oid}', 'commitOid': oid})

    def resolve(self, repo_id, revision, path):
        repo, commit = self.find(repo_id, revision)
        if not repo:
            return
        if path not in repo.commits[commit]:
            return self.send(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
        content = repo.commits[commit][path]
        headers = dict(X_Repo_Commit=commit, ETag=f'"{repo.oid(path, content)}"', Accept_Ranges='bytes')
        if path in repo.lfs:
            headers.update(X_Linked_Etag=headers['ETag'], X_Linked_Size=len(content))
        start = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if start:
            start = int(start[1])
            headers['Content_Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
            return self.send(206, content[start:], **headers)
        self.send(content=content, **headers)


def cut_upload(request):
    """Take half of an upload, then drop the connection."""
    request.rfile.read(int(request.headers['Content-Length']) // 2)
    request.connection.close()


def cut_download(request):
    """Promise a file, send half of it, then drop the connection."""
    repo_id, revision, path = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', request.path).groups()
    repo, commit = request.find(repo_id, revision)
    content = repo.commits[commit][path]
    request.send_response(200)
    request.send_header('Content-Length', str(len(content)))
    request.end_headers()
    request.wfile.write(content[:len(content) // 2])
    request.wfile.flush()
    request.connection.close()


REPO, REVISION = r'(?P<repo_id>[\w.-]+/[\w.-]+)', r'(?P<revision>[\w.-]+)'
ROUTES = [
    ('POST', '/api/repos/create', Handler.create),
    ('POST', '/api/validate-yaml', Handler.validate),
    ('POST', f'/api/models/{REPO}/preupload/{REVISION}', Handler.preupload),
    ('POST', f'/api/models/{REPO}/commit/{REVISION}', Handler.commit),
    ('POST', f'/api/models/{REPO}/branch/{REVISION}', Handler.branch),
    ('GET', f'/api/models/{REPO}/revision/{REVISION}', Handler.info),
    ('GET', f'/api/models/{REPO}', Handler.info),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/batch', Handler.lfs_batch),
    ('PUT', r'/lfs/(?P<oid>\w+)', Handler.lfs_put),
    ('GET HEAD', f'/{REPO}/resolve/{REVISION}/(?P<path>.+)', Handler.resolve),
]
