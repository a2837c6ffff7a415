//! A container's shadow in a pod that is there already: its machine is another's, and so is everything about that.

use std::cell::Cell;
use std::os::fd::AsFd;

use podhull_protocol::SharedNamespace;
use podhull_vmm::control::Resource;
use podhull_vmm::jail::Jail;

use super::link::{Given, News};
use super::session::{Outcome, Session};
use super::size::memory_limit;
use super::sockets::{Socket, Sockets};
use super::start::{Run, RunError};
use super::timeline::{Phase, Timeline};
use super::view::{View, namespaces};
use super::{descriptors, disks, mounts, rest};
use crate::agent::{self, Agent, AgentError};
use crate::confine::confine_but_for_mounting;
use crate::machine::Control;
use crate::signals::{self, Signals};
use crate::state;
use crate::stdio::Stdio;

/// Runs a container; returns the status to exit with. Its files stay in the pod's machine: this process has no rights left by
/// then, so it is up to whoever asked for it, or deletes it, to take them out.
pub fn run(run: &Run<'_>, given: Given, mut timeline: Timeline) -> Result<u8, RunError> {
    let Given { begin, terminal, mounts: machine, namespaces: joined, descriptors, .. } = given;
    let (Some(pod), Some(machine)) = (&begin.pod, machine) else { return Err(RunError::NoMachine) };
    if run.guest_console.is_some() {
        return Err(RunError::ConsoleOfAnother(pod.pod.clone()));
    }
    let mut bundle = run.open_bundle(&begin)?;
    bundle.config.add_environment(descriptors::environment(begin.listening));
    let descriptors = descriptors::prepare(descriptors, &descriptors::directory(run.id))?;
    let limit = memory_limit(bundle.config.spec());

    // From here on there is something to remove.
    signals::block();
    let mut made = run.make(&begin, &mut bundle)?;
    let console_size = bundle.config.console_size();
    let stdio = Stdio::new(bundle.config.terminal(), run.console_socket, console_size, terminal)?;
    let stdio = stdio.in_foreground(begin.foreground).leased()?.and(descriptors.streams);
    let sockets = state::open_pod(run.root, &pod.pod)?;

    let mut mounts = mounts::prepare(run.id, &mut bundle)?;
    mounts.add_files(descriptors.files)?;
    let files = mounts.resources;
    let turn = state::take_turn_of_mounts(run.root, &pod.pod)?;
    let attached = Jail::of_running(machine.as_fd(), |share| {
        // Of one with the same name whose creator was killed.
        share.detach(run.id)?;
        files.iter().try_for_each(|(resource, mount)| match resource {
            Resource::Mount { path } => share.attach(path, mount),
            Resource::SharedMount { name, user } => share.attach_shared(name, user, mount),
            _ => Ok(()),
        })
    });
    attached.map_err(|error| RunError::Share(pod.pod.clone(), error))?;
    drop((files, machine, turn));
    let disks = disks::open(&bundle.config)?;
    bundle.config.clear_namespace_paths();
    let shared = begin.shared.iter().map(|shared| SharedNamespace {
        type_: super::join::word(shared.kind),
        container_id: shared.container.clone(),
        ..Default::default()
    });
    let spec = bundle.config.document();
    let rootfs = mounts::root_in_share(run.id);
    mounts.warnings.iter().for_each(|warning| run.log.warning(warning));
    let told = mounts.sockets.iter().map(Socket::told).collect();
    let mut request =
        agent::container(run.id, spec, rootfs, stdio.announcement(), mounts.memory, mounts.directories, told);
    request.shared = shared.collect();
    (request.disks, request.descriptors) = (disks.told, descriptors.told);
    request.volumes = mounts.volumes.told();
    let view = View {
        root: mounts.root,
        places: mounts.places,
        namespaces: namespaces(&bundle.config).others,
        joined,
        hostname: bundle.config.spec().hostname().clone(),
    };
    drop(bundle);
    // No path of the host from here on.
    made.entered = Some(view.enter()?);
    made.sockets = Sockets::start(mounts.sockets, sockets.as_fd()).map_err(RunError::Sockets)?;
    confine_but_for_mounting().map_err(RunError::Privileges)?;
    let agent = crate::stdio::dial(sockets.as_fd(), podhull_protocol::AGENT_PORT).map_err(AgentError::Connect)?;
    let connections = made.connections();
    run.creator.tell(&News::Entered)?;

    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(RunError::Signals)?;
    let memory_limit = Cell::new(None);
    let outcome: Result<Outcome, RunError> = runtime.block_on(async {
        let signals = Signals::new().map_err(RunError::Signals)?;
        let orders = run.creator.orders().map_err(RunError::Signals)?;
        timeline.end(Phase::Prepare);
        let agent = Agent::new(agent)?.counted(sockets.as_fd());
        let session = Session::new(run.id, agent, &stdio, sockets.as_fd(), timeline, run.log);
        let make = async {
            memory_limit.set(orders.entered().await?.memory_limit);
            if !disks.resources.is_empty() {
                let (resources, fds) = disks.resources.into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
                Control::dial(sockets.as_fd())?.add(resources, &fds).await?;
            }
            session.reached(Phase::Hooks);
            let made = async { Ok(session.agent.create_container(&request).await?) };
            let (flow, ()) = tokio::try_join!(session.streams(), made)?;
            session.reached(Phase::Create);
            run.log.debug(|| format!("{}: container created in pod {}", run.id, pod.pod));
            Ok(flow)
        };
        let reached = |step, timeline: &Timeline| made.reached(step, timeline, run.creator, &begin);
        let meanwhile = async {
            rest::give_back();
            mounts.volumes.serve(&session).await
        };
        let live = session.live(make, meanwhile, &orders, begin.foreground, reached);
        tokio::select! {
            biased;
            lived = live => lived,
            signalled = session.signals(&signals) => signalled,
            never = connections => match never {},
        }
    });
    // Threads that still wait for input must not hold up the end; they end with the process.
    runtime.shutdown_background();
    Ok(run.end(made, outcome?, limit, memory_limit.take()))
}
