//! `delete`: removes what is left of a container whose shim is gone, or has not answered containerd in time. Nobody inside is asked.
//! containerd ends this program after five seconds, and without an answer it takes the container for one that has ended in no known way,
//! and keeps its bundle. So what cannot be removed is told, and is no reason not to remove the rest, nor to say nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, ShutdownRequest, WaitRequest};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api::ShutdownSandboxRequest;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::TaskClient;
use tokio::task::JoinSet;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

use super::arguments::Arguments;
use super::events::timestamp;
use super::{rootfs, start, state_root};
use crate::log::Log;
use crate::pod;
use crate::state::{self, Known, StateError};

/// What containerd is told of a container that was killed.
const KILLED: u32 = 137;

/// How long all together is waited for what was killed to end, and for others to be done with it.
const ENDS: Duration = Duration::from_secs(3);

/// How long a shim that lives may take to end.
const DISMISSED: Duration = Duration::from_secs(1);

/// When containerd has its answer at the latest, whatever there is still to do.
const ANSWER: Duration = Duration::from_secs(4);

/// What is left of a container.
struct Wreck {
    root: PathBuf,
    id: String,
    bundle: PathBuf,
    log: Log,
}

/// Returns what to print.
pub fn delete(arguments: &Arguments) -> Vec<u8> {
    let began = Instant::now();
    let root = state_root(&arguments.namespace);
    let pid = Known::load(&root, &arguments.id).map_or(0, |known| known.state.process.pid.cast_unsigned());
    // The working directory is the bundle, where the option is not given.
    let bundle = arguments.bundle.clone().or_else(|| std::env::current_dir().ok()).unwrap_or_default();
    let wreck = Wreck { root, id: arguments.id.clone(), bundle, log: Log::stderr() };
    wreck.remove_in_time(began + ENDS, began + ANSWER);
    let exited_at = MessageField::some(timestamp(SystemTime::now()));
    let answer = DeleteResponse { pid, exit_status: KILLED, exited_at, ..Default::default() };
    answer.write_to_bytes().unwrap_or_default()
}

impl Wreck {
    /// Removes it, and comes back at `answer` also if that is not done by then: a hook may take as long as it likes, and a file system
    /// of the host may be stuck.
    fn remove_in_time(self, ends: Instant, answer: Instant) {
        let wreck = Arc::new(self);
        let (done, waits) = sync_channel(1);
        let this = wreck.clone();
        let work = move || {
            this.remove(ends);
            let _ = done.send(());
        };
        if thread::Builder::new().name("delete".into()).spawn(work).is_err() {
            wreck.remove(ends);
        } else if waits.recv_timeout(answer.saturating_duration_since(Instant::now())).is_err() {
            wreck.log.warning(&format!("container {:?} is not removed yet: not waited for any longer", wreck.id));
        }
    }

    fn remove(&self, ends: Instant) {
        let (all, unreadable) = self.find();
        // What takes time comes later.
        for known in &all {
            self.warn(known.kill());
        }
        for bundle in all.iter().map(|known| &*known.state.bundle).chain([&*self.bundle]) {
            self.warn(rootfs::unmount_all(bundle));
        }
        let shim = start::socket_of(&self.bundle);
        let ids: Vec<_> = all.iter().map(|known| known.state.id.clone()).collect();
        if unreadable {
            self.warn(state::remove_until(&self.root, &self.id, ends));
        }
        let mut removed = Vec::new();
        for known in all {
            let state = known.state.clone();
            if known.clear(ends, |error| self.log.warning(&error.to_string())) {
                removed.push(state);
            }
        }
        if let Some(shim) = shim.filter(|_| !ids.is_empty()) {
            // Hooks are still to run.
            self.dismiss(&shim, &ids, (Instant::now() + DISMISSED).min(ends + DISMISSED / 2));
        }
        removed.iter().for_each(|state| pod::tell_of_removal(state, &self.log));
    }

    /// The container, and with the first one of a pod all others: their machine is its own, and containerd 2 may not ask for them. And
    /// whether it is there, and not to be read.
    fn find(&self) -> (Vec<Known>, bool) {
        let (mut all, unreadable) = match Known::load(&self.root, &self.id) {
            Ok(known) => (vec![known], false),
            Err(StateError::Missing(_)) => return (Vec::new(), false),
            Err(error) => {
                self.warn(Err(error));
                (Vec::new(), true)
            }
        };
        if all.iter().all(|known| known.state.member_of.is_none()) {
            let of_pod = |known: &Known| known.state.member_of.as_ref().is_some_and(|member| member.pod == self.id);
            match state::list(&self.root) {
                Ok(known) => all.extend(known.into_iter().filter(of_pod)),
                Err(error) => self.warn(Err(error)),
            }
        }
        (all, unreadable)
    }

    /// Tells a shim that lives what containerd, which has given it up, does not tell it: that it is to forget these containers, and to end
    /// with its last one. After an ordinary deletion there is nothing left to find, and it is told nothing.
    fn dismiss(&self, shim: &Path, ids: &[String], until: Instant) {
        let told = async {
            // It may have ended by itself.
            let Ok(stream) = tokio::net::UnixStream::connect(shim).await else { return };
            let client = Client::new(Socket::new(stream));
            let tasks = TaskClient::new(client.clone());
            // It does so when it has none left; what it does not tell in time of one is no reason to stay.
            let id = self.id.clone();
            let _ = tasks.shutdown(Context::default(), &ShutdownRequest { id, ..Default::default() }).await;
            let forget = |id: &String| {
                let (tasks, id) = (tasks.clone(), id.clone());
                async move {
                    // Nothing is forgotten that runs, as far as is known there. That it is not known there is no matter.
                    let _ = tasks.wait(Context::default(), &WaitRequest { id: id.clone(), ..Default::default() }).await;
                    let _ = tasks.delete(Context::default(), &DeleteRequest { id, ..Default::default() }).await;
                }
            };
            // The first container of a pod comes last.
            let mut members: JoinSet<_> = ids.iter().skip(1).map(forget).collect();
            while members.join_next().await.is_some() {}
            if let Some(first) = ids.first() {
                forget(first).await;
            }
            // If it is a pod for itself: that alone keeps the process.
            let request = ShutdownSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
            let _ = SandboxClient::new(client).shutdown_sandbox(Context::default(), &request).await;
        };
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build() {
            Ok(runtime) => runtime,
            Err(error) => return self.warn(Err(error)),
        };
        let left = until.saturating_duration_since(Instant::now());
        if runtime.block_on(async { tokio::time::timeout(left, told).await }).is_err() {
            let shim = shim.display();
            self.log.warning(&format!("the shim at {shim} does not answer: end its process, podhull-shim"));
        }
    }

    fn warn<E: std::fmt::Display>(&self, result: Result<(), E>) {
        if let Err(error) = result {
            self.log.warning(&error.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::{Sender, channel};

    use async_trait::async_trait;
    use containerd_shim_protos::api::{Empty, WaitResponse};
    use containerd_shim_protos::shim_async::{Task, create_task};
    use oci_spec::runtime::{Hook, Hooks};
    use rustix::fs::FlockOperation;
    use ttrpc::r#async::TtrpcContext;

    use super::*;
    use crate::state::{Directory, Machine, Membership, Process, State};

    /// A state root with containers whose processes are children of the test.
    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        /// One in the pod of another, or in one of its own.
        fn add(&self, id: &str, pod: Option<(&str, &Child)>, change: impl FnOnce(&mut State)) -> Child {
            let child = Command::new("sleep").arg("1000").spawn().unwrap();
            let mut held = Directory::create(self.path(), id).unwrap();
            let bundle = self.path().join("bundle");
            let mut state = State::new(id, child.id().cast_signed(), &bundle, &bundle.join("rootfs"), None);
            state.kept = true;
            state.member_of = pod.map(|(pod, machine)| Membership {
                pod: pod.into(),
                machine: Machine(Process::of(machine.id().cast_signed())),
            });
            change(&mut state);
            held.write(&state).unwrap();
            held.keep();
            drop(held);
            std::fs::create_dir(self.path().join("pods").join(id)).unwrap();
            child
        }

        fn ids(&self) -> Vec<String> {
            state::list(self.path()).unwrap().into_iter().map(|known| known.state.id).collect()
        }

        /// Removes one, and says how long that took.
        fn remove(&self, id: &str) -> Duration {
            // No test waits so long for what happens.
            self.remove_within(id, Duration::from_secs(20))
        }

        /// The same, where something does not come to its end: it is given up after so long.
        fn remove_within(&self, id: &str, most: Duration) -> Duration {
            let (root, bundle) = (self.path().to_owned(), self.path().join("bundle"));
            let began = Instant::now();
            let ends = began + most;
            let wreck = Wreck { root, id: id.into(), bundle, log: Log::stderr() };
            wreck.remove_in_time(ends, ends + Duration::from_secs(1));
            began.elapsed()
        }
    }

    fn was_killed(mut child: Child) -> bool {
        let ended = child.try_wait().unwrap().is_some();
        let _ = child.kill();
        let _ = child.wait();
        ended
    }

    #[test]
    fn with_the_first_container_of_a_pod_its_others_go() {
        let root = Root::new();
        let pause = root.add("pause", None, |_| {});
        let members = ["one", "two"].map(|id| root.add(id, Some(("pause", &pause)), |_| {}));
        let other = root.add("other", None, |_| {});
        let of_other = root.add("of-other", Some(("other", &other)), |_| {});
        root.remove("one");
        assert_eq!(root.ids(), ["of-other", "other", "pause", "two"]);
        root.remove("pause");
        assert_eq!(root.ids(), ["of-other", "other"]);
        assert_eq!(std::fs::read_dir(root.path().join("pods")).unwrap().count(), 2);
        assert!(was_killed(pause) && members.into_iter().all(was_killed));
        assert!(![other, of_other].map(was_killed).contains(&true));
        root.remove("never-there");
        root.remove("../none");
    }

    #[test]
    fn what_does_not_come_to_an_end_keeps_no_answer_back() {
        let root = Root::new();
        let mut hook = Hook::default();
        hook.set_path("/bin/sleep".into());
        hook.set_args(Some(vec!["sleep".into(), "20".into()]));
        let mut hooks = Hooks::default();
        hooks.set_poststop(Some(vec![hook]));
        std::fs::create_dir(root.path().join("bundle")).unwrap();
        let child = root.add("c", None, |state| state.hooks = Some(hooks));
        let took = root.remove_within("c", Duration::from_secs(1));
        assert!((Duration::from_secs(2)..Duration::from_secs(10)).contains(&took), "{took:?}");
        assert!(was_killed(child));
        assert!(root.ids().is_empty());
    }

    /// A command that changes it is stuck, as one would be that asks a guest.
    #[test]
    fn what_is_not_removed_in_time_is_nobody_s() {
        let root = Root::new();
        let child = root.add("c", None, |_| {});
        let turn = std::fs::File::create(root.path().join("c/lock")).unwrap();
        rustix::fs::flock(&turn, FlockOperation::LockExclusive).unwrap();
        let took = root.remove_within("c", Duration::from_secs(1));
        assert!((Duration::from_secs(1)..Duration::from_secs(10)).contains(&took), "{took:?}");
        assert!(was_killed(child));
        assert_eq!(root.ids(), ["c"]);
        drop(turn);
        drop(Directory::create(root.path(), "c").unwrap());
        assert!(root.ids().is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_removed() {
        let root = Root::new();
        let child = root.add("c", None, |_| {});
        let member = root.add("m", Some(("c", &child)), |_| {});
        std::fs::write(root.path().join("c/state.json"), "{").unwrap();
        root.remove("c");
        assert!(root.ids().is_empty() && !root.path().join("c").exists());
        assert!(was_killed(member) && !was_killed(child), "of whom nothing is known");
    }

    /// A shim that tells what it is asked for.
    struct Telling(Sender<String>);

    impl Telling {
        fn tell<T: Default>(&self, what: String) -> ttrpc::Result<T> {
            self.0.send(what).unwrap();
            Ok(T::default())
        }
    }

    #[async_trait]
    impl Task for Telling {
        async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
            self.tell(format!("wait {}", request.id))
        }

        async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
            self.tell(format!("delete {}", request.id))
        }

        async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
            self.tell(format!("shutdown {}", request.id))
        }
    }

    #[test]
    fn a_shim_that_lives_is_told_to_end() {
        let root = Root::new();
        let (bundle, socket) = (root.path().join("bundle"), root.path().join("s"));
        std::fs::create_dir(&bundle).unwrap();
        let address = format!("unix://{}", socket.display());
        std::fs::write(bundle.join("address"), &address).unwrap();
        let (sender, told) = channel();
        let (ready, is_ready) = sync_channel(1);
        let (_ends, ended) = tokio::sync::oneshot::channel::<()>();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let server = ttrpc::r#async::Server::new().bind(&address).unwrap();
                let mut server = server.register_service(create_task(Arc::new(Telling(sender))));
                server.start().await.unwrap();
                ready.send(()).unwrap();
                let _ = ended.await;
            });
        });
        is_ready.recv().unwrap();
        let pause = root.add("pause", None, |_| {});
        let member = root.add("one", Some(("pause", &pause)), |_| {});
        root.remove("none-of-its");
        assert!(told.try_recv().is_err());
        root.remove("pause");
        let expected = ["shutdown pause", "wait one", "delete one", "wait pause", "delete pause"];
        assert_eq!(told.try_iter().collect::<Vec<_>>(), expected);
        assert!(was_killed(pause) && was_killed(member) && root.ids().is_empty());
    }

    #[test]
    fn a_shim_that_does_not_answer_holds_nothing_up() {
        let root = Root::new();
        let (bundle, socket) = (root.path().join("bundle"), root.path().join("s"));
        std::fs::create_dir(&bundle).unwrap();
        std::fs::write(bundle.join("address"), format!("unix://{}", socket.display())).unwrap();
        let hung = UnixListener::bind(&socket).unwrap();
        let child = root.add("c", None, |_| {});
        let took = root.remove("c");
        assert!((DISMISSED..Duration::from_secs(10)).contains(&took), "{took:?}");
        assert!(was_killed(child) && root.ids().is_empty() && socket.exists());
        drop(hung);
        let child = root.add("c", None, |_| {});
        root.remove("c");
        assert!(was_killed(child) && !socket.exists());
    }
}
